package main

import (
	"context"
	"errors"
	"fmt"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const insert = "INSERT INTO matrix.item (name) VALUES ($1)"

func savepoints(ctx context.Context, conn *pgx.Conn) any {
	outer := cases.Must(conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}))
	exec(ctx, outer, insert, "one")
	inner := cases.Must(outer.Begin(ctx))
	exec(ctx, inner, insert, "two")
	_, err := inner.Exec(ctx, insert, "one")
	violated := cases.Fails(err, state)
	cases.Check(inner.Rollback(ctx))
	inner = cases.Must(outer.Begin(ctx))
	exec(ctx, inner, insert, "three")
	innermost := cases.Must(inner.Begin(ctx))
	exec(ctx, innermost, insert, "four")
	cases.Check(innermost.Rollback(ctx))
	cases.Check(inner.Commit(ctx))
	names := one[[]string](
		ctx, outer, "SELECT array_agg(name ORDER BY id) FROM matrix.item",
	)
	cases.Equal(names, []string{"one", "three"})
	level := one[string](ctx, outer, "SHOW transaction_isolation")
	cases.Check(outer.Rollback(ctx))
	left := one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
	return []any{violated, names, level, left, string(conn.PgConn().TxStatus())}
}

// errorsAndRecovery returns what an error tells, field by field.
func errorsAndRecovery(ctx context.Context, conn *pgx.Conn) any {
	var told []string
	exec(ctx, conn, insert, "only")
	defer conn.Exec(ctx, "DELETE FROM matrix.item")
	for range 3 {
		for _, each := range []struct {
			query string
			args  []any
		}{
			{insert, []any{"only"}},
			{"SELECT wrong syntax here", nil},
			{"SELECT * FROM matrix.nowhere WHERE a = $1", []any{"x"}},
			{"SELECT 1 / $1::int", []any{0}},
			{"INSERT INTO matrix.item (id, name) VALUES (NULL, $1)", []any{"x"}},
			{"SELECT $1::text::int", []any{"many"}},
		} {
			_, err := conn.Exec(ctx, each.query, each.args...)
			var failure *pgconn.PgError
			if !errors.As(err, &failure) {
				panic(fmt.Sprintf("%s: %v", each.query, err))
			}
			told = append(told, fmt.Sprint(
				failure.Severity, failure.Code, failure.Message, failure.Detail,
				failure.Hint, failure.Position, failure.SchemaName, failure.TableName,
				failure.ColumnName, failure.ConstraintName, failure.Routine,
			))
			cases.Equal(one[int32](ctx, conn, "SELECT 1 + $1::int", 1), int32(2))
		}
	}
	return told
}

func failedTransaction(ctx context.Context, conn *pgx.Conn) any {
	tx := cases.Must(conn.Begin(ctx))
	exec(ctx, tx, insert, "lost")
	_, err := tx.Exec(ctx, "SELECT 1 / $1::int", 0)
	told := []string{cases.Fails(err, state), string(conn.PgConn().TxStatus())}
	_, err = tx.Exec(ctx, "SELECT $1::int", 1)
	told = append(told, cases.Fails(err, state))
	cases.Equal(errors.Is(tx.Commit(ctx), pgx.ErrTxCommitRollback), true)
	told = append(told, string(conn.PgConn().TxStatus()))
	cases.Equal(one[int64](ctx, conn, "SELECT count(*) FROM matrix.item"), int64(0))
	return told
}
