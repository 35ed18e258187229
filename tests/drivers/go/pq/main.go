// lib/pq: database/sql over its text and its binary parameters, and its Listener.
package main

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"os"

	"drivers/cases"

	"github.com/lib/pq"
)

// main runs the cases with the parameters' format that is named, or those that are
// the same in each.
func main() {
	if len(os.Args) > 1 {
		testFormat(os.Args[1])
	} else {
		testOthers()
	}
	cases.Run()
}

// urlWith returns the URL under test with settings of the driver, or start-up
// parameters of the server's.
func urlWith(settings map[string]string) string {
	whole := cases.Must(url.Parse(cases.URL()))
	query := whole.Query()
	query.Set("sslmode", "disable")
	for name, value := range settings {
		query.Set(name, value)
	}
	whole.RawQuery = query.Encode()
	return whole.String()
}

func open(settings map[string]string) *sql.DB {
	return cases.Must(sql.Open("postgres", urlWith(settings)))
}

func openDirect() *sql.DB {
	return cases.Must(sql.Open("postgres", cases.DirectURL()+"?sslmode=disable"))
}

type queryer interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// one runs a query that answers one row of one column.
func one[T any](ctx context.Context, conn queryer, query string, args ...any) T {
	var value T
	cases.Check(conn.QueryRowContext(ctx, query, args...).Scan(&value))
	return value
}

func exec(ctx context.Context, conn execer, query string, args ...any) {
	cases.Must(conn.ExecContext(ctx, query, args...))
}

func state(err error) string {
	var told *pq.Error
	if errors.As(err, &told) {
		return string(told.Code)
	}
	return ""
}
