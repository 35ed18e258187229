package main

import (
	"context"
	"database/sql"

	"drivers/cases"
)

// movingConn has a pooled connection change its server: before each statement that
// it is told to run, one of two rivals begins a transaction on the server that was
// used last, and the other gives back the one that it held.
type movingConn struct {
	*sql.Conn
	idle, holding *sql.Conn
	db            *sql.DB
}

func connect(ctx context.Context, settings map[string]string) *movingConn {
	db := open(settings)
	conn := &movingConn{
		cases.Must(db.Conn(ctx)), cases.Must(db.Conn(ctx)), cases.Must(db.Conn(ctx)), db,
	}
	exec(ctx, conn.holding, "BEGIN")
	return conn
}

func (conn *movingConn) close() {
	for _, each := range []*sql.Conn{conn.Conn, conn.idle, conn.holding} {
		each.Close()
	}
	conn.db.Close()
}

func (conn *movingConn) move(ctx context.Context) {
	exec(ctx, conn.idle, "BEGIN")
	exec(ctx, conn.holding, "COMMIT")
	conn.idle, conn.holding = conn.holding, conn.idle
}

func (conn *movingConn) QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row {
	conn.move(ctx)
	return conn.Conn.QueryRowContext(ctx, query, args...)
}

func (conn *movingConn) QueryContext(
	ctx context.Context, query string, args ...any,
) (*sql.Rows, error) {
	conn.move(ctx)
	return conn.Conn.QueryContext(ctx, query, args...)
}

func (conn *movingConn) ExecContext(
	ctx context.Context, query string, args ...any,
) (sql.Result, error) {
	conn.move(ctx)
	return conn.Conn.ExecContext(ctx, query, args...)
}

func (conn *movingConn) PrepareContext(ctx context.Context, query string) (*sql.Stmt, error) {
	conn.move(ctx)
	return conn.Conn.PrepareContext(ctx, query)
}
