package main

import (
	"context"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
)

// mover has a pooled connection change its server: before whatever the connection
// asks for outside of a transaction, one of two rivals begins a transaction on the
// server that was used last, and the other gives back the one that it held.
type mover struct {
	idle, holding *pgx.Conn
}

func newMover(ctx context.Context) *mover {
	rivals := &mover{connect(ctx), connect(ctx)}
	exec(ctx, rivals.holding, "BEGIN")
	return rivals
}

func (rivals *mover) close(ctx context.Context) {
	rivals.idle.Close(ctx)
	rivals.holding.Close(ctx)
}

func (rivals *mover) move(ctx context.Context, conn *pgx.Conn) context.Context {
	if conn.PgConn().TxStatus() == 'I' {
		exec(ctx, rivals.idle, "BEGIN")
		exec(ctx, rivals.holding, "COMMIT")
		rivals.idle, rivals.holding = rivals.holding, rivals.idle
	}
	return ctx
}

func (rivals *mover) TraceQueryStart(
	ctx context.Context, conn *pgx.Conn, _ pgx.TraceQueryStartData,
) context.Context {
	return rivals.move(ctx, conn)
}

func (rivals *mover) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (rivals *mover) TraceBatchStart(
	ctx context.Context, conn *pgx.Conn, _ pgx.TraceBatchStartData,
) context.Context {
	return rivals.move(ctx, conn)
}

func (rivals *mover) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (rivals *mover) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

func (rivals *mover) TraceCopyFromStart(
	ctx context.Context, conn *pgx.Conn, _ pgx.TraceCopyFromStartData,
) context.Context {
	return rivals.move(ctx, conn)
}

func (rivals *mover) TraceCopyFromEnd(context.Context, *pgx.Conn, pgx.TraceCopyFromEndData) {}

func (rivals *mover) TracePrepareStart(
	ctx context.Context, conn *pgx.Conn, _ pgx.TracePrepareStartData,
) context.Context {
	return rivals.move(ctx, conn)
}

func (rivals *mover) TracePrepareEnd(context.Context, *pgx.Conn, pgx.TracePrepareEndData) {}

// connectMoving opens a connection that changes its server as often as it can.
func connectMoving(
	ctx context.Context, change ...func(*pgx.ConnConfig),
) (conn *pgx.Conn, closeAll func()) {
	rivals := newMover(ctx)
	conn = connect(ctx, append(change, func(config *pgx.ConnConfig) {
		config.Tracer = rivals
	})...)
	return conn, func() {
		cases.Check(conn.Close(ctx))
		rivals.close(ctx)
	}
}
