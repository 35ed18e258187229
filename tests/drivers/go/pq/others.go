package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"drivers/cases"

	"github.com/lib/pq"
)

const (
	poolSize    = 20
	poolQueries = 1000
)

// testOthers adds the cases in which the format of parameters plays no part.
func testOthers() {
	test := cases.Test
	test("several statements", severalStatements)
	test("context cancels", contextCancels)
	test("cursor", cursor)
	test("notices", notices)
	test("listener", listener)
	test("start-up settings", startupSettings)
	test("settings last", settingsLast)
	test("temporary table", temporaryTable)
	test("latest protocol", latestProtocol)
	test("pool", pool)
	test("pool of transactions", poolOfTransactions)
	test("pool after cancels", poolAfterCancels)
}

func severalStatements(ctx context.Context) any {
	conn := connect(ctx, nil)
	defer conn.close()
	var told []string
	rows := cases.Must(conn.QueryContext(
		ctx, "SELECT 1; SELECT 'a' FROM generate_series(1, 3); SET LOCAL work_mem = '5MB'; SELECT 3",
	))
	for more := true; more; more = rows.NextResultSet() {
		for rows.Next() {
			var value string
			cases.Check(rows.Scan(&value))
			told = append(told, value)
		}
		told = append(told, "end")
	}
	cases.Check(rows.Err())
	cases.Check(rows.Close())
	for _, query := range []string{"", "/* nothing */ ; ;", "SELECT 1; SELECT 1/0; SELECT 2"} {
		_, err := conn.ExecContext(ctx, query)
		told = append(told, state(err))
	}
	return told
}

// whileItRuns runs a statement, ends its context as soon as the server runs it, and
// returns its error.
func whileItRuns(ctx context.Context, conn execer, query string) error {
	ending, end := context.WithCancel(ctx)
	defer end()
	ended := make(chan error, 1)
	go func() {
		_, err := conn.ExecContext(ending, query)
		ended <- err
	}()
	other := openDirect()
	defer other.Close()
	for len(ended) == 0 && one[int](ctx, other,
		"SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND state = 'active'",
		query) == 0 {
	}
	end()
	return <-ended
}

func contextCancels(ctx context.Context) any {
	db := open(nil)
	defer db.Close()
	db.SetMaxOpenConns(1)
	var told []string
	for number := range 3 {
		query := fmt.Sprintf("SELECT pg_sleep(60) /* pq: context cancels %d */", number)
		told = append(told, cases.Fails(whileItRuns(ctx, db, query), state))
		cases.Equal(one[int](ctx, db, "SELECT 1"), 1)
	}
	tx := cases.Must(db.BeginTx(ctx, nil))
	query := "SELECT pg_sleep(60) /* pq: context cancels in a transaction */"
	told = append(told, cases.Fails(whileItRuns(ctx, tx, query), state))
	tx.Rollback()
	cases.Equal(one[int](ctx, db, "SELECT 1"), 1)
	return told
}

func cursor(ctx context.Context) any {
	conn := connect(ctx, nil)
	defer conn.close()
	tx := cases.Must(conn.BeginTx(ctx, nil))
	defer tx.Rollback()
	exec(ctx, tx, "DECLARE walk CURSOR FOR SELECT generate_series(1, 1000)")
	var told []int
	for count := -1; count != 0; {
		rows := cases.Must(tx.QueryContext(ctx, "FETCH 300 FROM walk"))
		count = 0
		for rows.Next() {
			count++
		}
		cases.Check(rows.Err())
		told = append(told, count)
	}
	return told
}

func notices(ctx context.Context) any {
	var heard []string
	connector := pq.ConnectorWithNoticeHandler(
		cases.Must(pq.NewConnector(urlWith(nil))),
		func(notice *pq.Error) {
			heard = append(heard, notice.Severity+string(notice.Code)+notice.Message)
		},
	)
	db := sql.OpenDB(connector)
	defer db.Close()
	exec(ctx, db, "DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'zwei: ü'; END $$")
	exec(ctx, db, "DROP TABLE IF EXISTS matrix.nowhere")
	return heard
}

// listener hears on two channels, and pings between.
func listener(ctx context.Context) any {
	failures := make(chan error, 10)
	own := pq.NewListener(
		urlWith(nil), time.Second, time.Minute,
		func(_ pq.ListenerEventType, err error) {
			if err != nil {
				failures <- err
			}
		},
	)
	defer own.Close()
	db := open(nil)
	defer db.Close()
	var told []string
	hear := func() {
		select {
		case note := <-own.Notify:
			told = append(told, note.Channel+": "+note.Extra)
		case err := <-failures:
			panic(err)
		case <-time.After(5 * time.Second):
			panic("nothing heard")
		}
	}
	cases.Check(own.Listen("pq one"))
	cases.Check(own.Listen("pq_two"))
	for number := range 3 {
		exec(ctx, db, "SELECT pg_notify('pq one', $1)", fmt.Sprint("told ", number))
		hear()
		cases.Check(own.Ping())
	}
	cases.Check(own.Unlisten("pq one"))
	exec(ctx, db, `NOTIFY "pq one", 'to nobody'`)
	exec(ctx, db, "NOTIFY pq_two, 'to the other'")
	hear()
	return told
}

func startupSettings(ctx context.Context) any {
	conn := connect(ctx, map[string]string{
		"application_name": "drivers ü",
		"search_path":      "matrix,public",
		"work_mem":         "7MB",
		"timezone":         "Asia/Kathmandu",
	})
	defer conn.close()
	var told []string
	for range 3 {
		for _, name := range []string{"application_name", "search_path", "work_mem", "TimeZone"} {
			told = append(told, one[string](ctx, conn, "SHOW "+name))
		}
		told = append(told, one[string](ctx, conn, "SELECT 'item'::regclass::text"))
		told = append(told, one[string](ctx, conn, "SELECT '2026-01-02 03:04+00'::timestamptz::text"))
	}
	return told
}

// settingsLast has ten connections at once, each with settings of its own.
func settingsLast(ctx context.Context) any {
	db := open(nil)
	defer db.Close()
	cases.InParallel(10, 10, func(index int) {
		conn := cases.Must(db.Conn(ctx))
		defer conn.Close()
		name, path := fmt.Sprintf("number %d", index), fmt.Sprintf("schema_%d, public", index)
		exec(ctx, conn, fmt.Sprintf("SET application_name = '%s'", name))
		exec(ctx, conn, fmt.Sprintf("SET search_path = %s", path))
		exec(ctx, conn, "SELECT set_config('my.number', $1, false)", name)
		for range 20 {
			cases.Equal(one[string](ctx, conn, "SHOW application_name"), name)
			cases.Equal(one[string](ctx, conn, "SHOW search_path"), path)
			cases.Equal(one[string](ctx, conn, "SELECT current_setting('my.number')"), name)
		}
	})
	return nil
}

func temporaryTable(ctx context.Context) any {
	conn := connect(ctx, nil)
	defer conn.close()
	exec(ctx, conn, "CREATE TEMPORARY TABLE mine (a int)")
	for number := range 5 {
		exec(ctx, conn, "INSERT INTO mine VALUES ($1)", number)
	}
	sum := one[int](ctx, conn, "SELECT sum(a) FROM mine")
	exec(ctx, conn, "DROP TABLE mine")
	return sum
}

func latestProtocol(ctx context.Context) any {
	db := open(map[string]string{"max_protocol_version": "latest"})
	defer db.Close()
	query := "SELECT pg_sleep(60) /* pq: latest protocol */"
	return cases.Fails(whileItRuns(ctx, db, query), state)
}

func openPool() *sql.DB {
	db := open(nil)
	db.SetMaxOpenConns(poolSize)
	db.SetMaxIdleConns(poolSize)
	return db
}

func pool(ctx context.Context) any {
	db := openPool()
	defer db.Close()
	statement := cases.Must(db.PrepareContext(ctx, "SELECT $1::int8 * 2"))
	defer statement.Close()
	var sum atomic.Int64
	cases.InParallel(2*poolSize, poolQueries, func(number int) {
		if number%2 == 0 {
			query := fmt.Sprintf("SELECT $1::int8 + %d", number%25)
			sum.Add(one[int64](ctx, db, query, number))
			return
		}
		var double int64
		cases.Check(statement.QueryRowContext(ctx, number).Scan(&double))
		sum.Add(double)
	})
	return sum.Load()
}

// poolOfTransactions moves money to and fro; none may be lost or made.
func poolOfTransactions(ctx context.Context) any {
	db := openPool()
	defer db.Close()
	change := "UPDATE matrix.account SET balance = balance + $2 WHERE id = $1"
	cases.InParallel(2*poolSize, 300, func(number int) {
		tx := cases.Must(db.BeginTx(ctx, nil))
		defer tx.Rollback()
		// In the order of their ids, so that no two wait for each other.
		from := 1 + number%9
		exec(ctx, tx, change, from, -number)
		exec(ctx, tx, change, from+1, number)
		if number%10 != 0 {
			cases.Check(tx.Commit())
		}
	})
	return one[string](ctx, db, "SELECT string_agg(balance::text, ' ' ORDER BY id) FROM matrix.account")
}

// poolAfterCancels goes on although every third query is given up.
func poolAfterCancels(ctx context.Context) any {
	db := openPool()
	defer db.Close()
	var good atomic.Int64
	cases.InParallel(2*poolSize, 60, func(number int) {
		if number%3 != 0 {
			cases.Equal(one[int](ctx, db, "SELECT $1::int", number), number)
			good.Add(1)
			return
		}
		query := fmt.Sprintf("SELECT pg_sleep(60) /* pq: pool after cancels %d */", number)
		err := whileItRuns(ctx, db, query)
		cases.Equal(state(err) == "57014" || errors.Is(err, context.Canceled), true)
	})
	return good.Load()
}
