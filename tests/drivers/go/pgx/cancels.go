package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
)

// whileItRuns runs a statement, calls what it is given as soon as the server runs
// it, and returns how it ended.
func whileItRuns(ctx context.Context, conn execer, query string, call func()) error {
	ended := make(chan error, 1)
	go func() {
		_, err := conn.Exec(ctx, query)
		ended <- err
	}()
	other := connectDirect(ctx)
	defer other.Close(ctx)
	for countRunning(ctx, other, query) == 0 && len(ended) == 0 {
	}
	call()
	return <-ended
}

func countRunning(ctx context.Context, conn *pgx.Conn, query string) int64 {
	return one[int64](
		ctx, conn,
		"SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND state = 'active'",
		query,
	)
}

func cancelRequest(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	var told []string
	for number := range 3 {
		query := fmt.Sprintf("SELECT pg_sleep(60) /* cancel request %d */", number)
		err := whileItRuns(ctx, conn, query, func() {
			cases.Check(conn.PgConn().CancelRequest(ctx))
		})
		told = append(told, cases.Fails(err, state))
		cases.Equal(one[int32](ctx, conn, "SELECT 1"), int32(1))
	}
	// Inside a transaction, which is failed then.
	tx := cases.Must(conn.Begin(ctx))
	query := "SELECT pg_sleep(60) /* cancel request in a transaction */"
	err := whileItRuns(ctx, tx, query, func() {
		cases.Check(conn.PgConn().CancelRequest(ctx))
	})
	told = append(told, cases.Fails(err, state), string(conn.PgConn().TxStatus()))
	cases.Check(tx.Rollback(ctx))
	return append(told, string(conn.PgConn().TxStatus()))
}

// contextCancels has the driver send a cancel request and keep its connection.
func contextCancels(ctx context.Context) any {
	conn := connect(ctx, func(config *pgx.ConnConfig) {
		config.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
			return &pgconn.CancelRequestContextWatcherHandler{
				Conn: conn, DeadlineDelay: 30 * time.Second,
			}
		}
	})
	defer conn.Close(ctx)
	var told []string
	for number := range 3 {
		query := fmt.Sprintf("SELECT pg_sleep(60) /* context cancels %d */", number)
		ending, end := context.WithCancel(ctx)
		err := whileItRuns(ending, conn, query, end)
		told = append(told, cases.Fails(err, state))
		cases.Equal(conn.IsClosed(), false)
		cases.Equal(one[int32](ctx, conn, "SELECT 1"), int32(1))
	}
	return told
}

// contextCloses is what the driver does by default: it cancels and hangs up, and
// the server must not go on.
func contextCloses(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	query := "SELECT pg_sleep(60) /* context closes */"
	ending, end := context.WithCancel(ctx)
	err := whileItRuns(ending, conn, query, end)
	cases.Equal(errors.Is(err, context.Canceled), true)
	<-conn.PgConn().CleanupDone()
	other := connectDirect(ctx)
	defer other.Close(ctx)
	for countRunning(ctx, other, query) != 0 {
	}
	return conn.IsClosed()
}
