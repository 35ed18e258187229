// pgx 5: its five ways of running a query, batches, pipelines, COPY and its pool.
package main

import (
	"context"
	"errors"
	"os"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// main runs the cases of the way of running queries that is named, or those that
// are the same in each.
func main() {
	if len(os.Args) > 1 {
		testMode(os.Args[1])
	} else {
		testOthers()
	}
	cases.Run()
}

// connect opens a connection by the URL under test.
func connect(ctx context.Context, change ...func(*pgx.ConnConfig)) *pgx.Conn {
	config := cases.Must(pgx.ParseConfig(cases.URL()))
	for _, each := range change {
		each(config)
	}
	return cases.Must(pgx.ConnectConfig(ctx, config))
}

func connectDirect(ctx context.Context) *pgx.Conn {
	return cases.Must(pgx.Connect(ctx, cases.DirectURL()))
}

// one runs a query that answers one row of one column.
func one[T any](ctx context.Context, conn queryer, query string, args ...any) T {
	rows := cases.Must(conn.Query(ctx, query, args...))
	return cases.Must(pgx.CollectExactlyOneRow(rows, pgx.RowTo[T]))
}

type queryer interface {
	Query(ctx context.Context, query string, args ...any) (pgx.Rows, error)
}

func exec(ctx context.Context, conn execer, query string, args ...any) {
	cases.Must(conn.Exec(ctx, query, args...))
}

type execer interface {
	Exec(ctx context.Context, query string, args ...any) (pgconn.CommandTag, error)
}

func state(err error) string {
	var told *pgconn.PgError
	if errors.As(err, &told) {
		return told.Code
	}
	return ""
}
