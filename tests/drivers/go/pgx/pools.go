package main

import (
	"context"
	"database/sql"
	"fmt"
	"sync/atomic"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/jackc/pgx/v5/stdlib"
)

const (
	poolSize    = 20
	poolQueries = 1000
)

func openPool(ctx context.Context) *pgxpool.Pool {
	config := cases.Must(pgxpool.ParseConfig(cases.URL()))
	config.MaxConns = poolSize
	return cases.Must(pgxpool.NewWithConfig(ctx, config))
}

func pool(ctx context.Context) any {
	pool := openPool(ctx)
	defer pool.Close()
	var sum atomic.Int64
	cases.InParallel(2*poolSize, poolQueries, func(number int) {
		query := fmt.Sprintf("SELECT $1::int8 + %d", number%25)
		sum.Add(one[int64](ctx, pool, query, number))
	})
	cases.Equal(pool.Stat().TotalConns() <= poolSize, true)
	return sum.Load()
}

// poolOfTransactions moves money to and fro; none may be lost or made.
func poolOfTransactions(ctx context.Context) any {
	pool := openPool(ctx)
	defer pool.Close()
	change := "UPDATE matrix.account SET balance = balance + $2 WHERE id = $1"
	cases.InParallel(2*poolSize, 300, func(number int) {
		cases.Check(pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			// In the order of their ids, so that no two wait for each other.
			from := 1 + number%9
			exec(ctx, tx, change, from, -number)
			exec(ctx, tx, change, from+1, number)
			return nil
		}))
	})
	rows := cases.Must(pool.Query(ctx, "SELECT balance FROM matrix.account ORDER BY id"))
	return cases.Must(pgx.CollectRows(rows, pgx.RowTo[int]))
}

// poolAfterCancels goes on although every third query is given up.
func poolAfterCancels(ctx context.Context) any {
	pool := openPool(ctx)
	defer pool.Close()
	var good atomic.Int64
	cases.InParallel(2*poolSize, 60, func(number int) {
		if number%3 != 0 {
			cases.Equal(one[int](ctx, pool, "SELECT $1::int", number), number)
			good.Add(1)
			return
		}
		query := fmt.Sprintf("SELECT pg_sleep(60) /* pool after cancels %d */", number)
		ending, end := context.WithCancel(ctx)
		defer end()
		err := whileItRuns(ending, pool, query, end)
		cases.Equal(err == nil, false)
	})
	return good.Load()
}

// databaseSQL is the standard library's interface over this driver.
func databaseSQL(ctx context.Context) any {
	db := cases.Must(sql.Open("pgx", cases.URL()))
	defer db.Close()
	db.SetMaxOpenConns(poolSize)
	statement := cases.Must(db.PrepareContext(ctx, "SELECT $1::int8 * 2"))
	defer statement.Close()
	var sum atomic.Int64
	cases.InParallel(2*poolSize, poolQueries, func(number int) {
		var double int64
		cases.Check(statement.QueryRowContext(ctx, number).Scan(&double))
		sum.Add(double)
	})
	return sum.Load()
}
