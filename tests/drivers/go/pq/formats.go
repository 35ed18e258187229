package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"drivers/cases"

	"github.com/lib/pq"
)

// testFormat adds the cases that depend on the format of parameters: text, or what
// the driver calls binary, in which a query with parameters takes one round trip.
func testFormat(format string) {
	test := func(name string, run func(context.Context, *movingConn) any) {
		cases.Test(name, func(ctx context.Context) any {
			setting := map[string]string{"text": "no", "binary": "yes"}[format]
			conn := connect(ctx, map[string]string{"binary_parameters": setting})
			defer conn.close()
			return run(ctx, conn)
		})
	}
	test("values", values)
	test("statements again", statementsAgain)
	test("prepared statements", preparedStatements)
	test("300 prepared statements", manyPreparedStatements)
	test("savepoints", savepoints)
	test("errors", errorsAndRecovery)
	test("failed transaction", failedTransaction)
	test("copy in", copyIn)
	test("copy refused", copyRefused)
	test("large values", largeValues)
	test("many rows", manyRows)
	test("rows left unread", rowsLeftUnread)
}

var samples = []struct {
	kind  string
	value any
}{
	{"int2", int64(-32768)},
	{"int4", int64(math.MaxInt32)},
	{"int8", int64(math.MinInt64)},
	{"float4", 1.5e-30},
	{"float8", 1.0 / 3},
	{"float8", math.Inf(1)},
	{"float8", "NaN"},
	{"numeric", "123456789.000000001"},
	{"numeric", "-Infinity"},
	{"bool", true},
	{"text", "ögel 🐘 'single' \"double\" \\back $1 \n"},
	{"text", ""},
	{"bytea", allBytes()},
	{"bytea", []byte{}},
	{"date", time.Date(2026, 2, 28, 0, 0, 0, 0, time.UTC)},
	{"time", "23:59:59.999999"},
	{"timestamp", moment},
	{"timestamptz", moment},
	{"interval", "1 year 2 mons 3 days 00:00:04.000005"},
	{"uuid", "fe000000-0000-0000-0000-000000000001"},
	{"jsonb", `{"a": [1, 2.5, null, "ü"], "b": {"c": true}}`},
	{"json", `{"quote": "'\"\\"}`},
	{"int4[]", pq.Array([]sql.NullInt64{{Int64: 1, Valid: true}, {}, {Int64: 3, Valid: true}})},
	{"text[]", pq.Array([]string{"a", `b"c`, "{}", "NULL", "ü,", ""})},
	{"bytea[]", pq.Array([][]byte{allBytes(), {}})},
	{"int4range", "[1,9)"},
	{"inet", "2001:db8::1/64"},
	{"point", "(1.5,-2)"},
	{"varbit", "101"},
	{"matrix.mood", "sad"},
	{"text", nil},
	{"int8", sql.NullInt64{}},
}

var moment = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)

func allBytes() []byte {
	all := make([]byte, 256)
	for index := range all {
		all[index] = byte(index)
	}
	return all
}

// values come back as the driver reads them, and as the server writes them.
func values(ctx context.Context, conn *movingConn) any {
	var told []string
	for _, each := range samples {
		query := strings.ReplaceAll("SELECT $1::KIND, $1::KIND::text, $1::KIND IS NULL", "KIND", each.kind)
		var back any
		var text sql.NullString
		var isNull bool
		cases.Check(conn.QueryRowContext(ctx, query, each.value).Scan(&back, &text, &isNull))
		if raw, ok := back.([]byte); ok && each.kind != "bytea" {
			back = string(raw)
		}
		switch sent := each.value.(type) {
		case time.Time:
			cases.Equal(back.(time.Time).UTC(), sent)
		case int64, bool, []byte:
			cases.Equal(back, sent)
		case string:
			if each.kind != "float8" && each.kind != "time" {
				cases.Equal(back, sent)
			}
		}
		told = append(told, fmt.Sprint(back, text, isNull))
	}
	return told
}

func statementsAgain(ctx context.Context, conn *movingConn) any {
	var told []int64
	for number := range 30 {
		told = append(told, one[int64](ctx, conn, "SELECT $1::int + 1", number))
		told = append(told, one[int64](ctx, conn, "SELECT $1::int * $2::int", number, 3))
	}
	return told
}

func preparedStatements(ctx context.Context, conn *movingConn) any {
	var told []string
	for _, text := range []string{"SELECT $1::int + 1", "SELECT $1::text || '!'"} {
		statement := cases.Must(conn.PrepareContext(ctx, text))
		for number := range 5 {
			conn.move(ctx)
			var value string
			cases.Check(statement.QueryRowContext(ctx, fmt.Sprint(number)).Scan(&value))
			told = append(told, value)
		}
		cases.Check(statement.Close())
	}
	_, err := conn.PrepareContext(ctx, "SELECT wrong syntax here")
	return append(told, cases.Fails(err, state))
}

func manyPreparedStatements(ctx context.Context, conn *movingConn) any {
	var statements []*sql.Stmt
	for number := range 300 {
		text := fmt.Sprintf("SELECT $1::int * %d", number)
		statements = append(statements, cases.Must(conn.PrepareContext(ctx, text)))
	}
	for number := 299; number >= 0; number-- {
		conn.move(ctx)
		var product int
		cases.Check(statements[number].QueryRowContext(ctx, 2).Scan(&product))
		cases.Equal(product, 2*number)
		cases.Check(statements[number].Close())
	}
	return one[int64](ctx, conn, "SELECT $1::int", 5)
}

const insert = "INSERT INTO matrix.item (name) VALUES ($1)"

func savepoints(ctx context.Context, conn *movingConn) any {
	tx := cases.Must(conn.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
	exec(ctx, tx, insert, "one")
	exec(ctx, tx, "SAVEPOINT within")
	exec(ctx, tx, insert, "two")
	_, err := tx.ExecContext(ctx, insert, "one")
	violated := cases.Fails(err, state)
	exec(ctx, tx, "ROLLBACK TO SAVEPOINT within")
	exec(ctx, tx, insert, "three")
	exec(ctx, tx, "RELEASE SAVEPOINT within")
	names := one[string](ctx, tx, "SELECT string_agg(name, ',' ORDER BY id) FROM matrix.item")
	cases.Equal(names, "one,three")
	level := one[string](ctx, tx, "SHOW transaction_isolation")
	cases.Check(tx.Rollback())
	left := one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
	return []any{violated, names, level, left}
}

// errorsAndRecovery returns what an error tells, field by field.
func errorsAndRecovery(ctx context.Context, conn *movingConn) any {
	var told []string
	exec(ctx, conn, insert, "only")
	defer conn.ExecContext(ctx, "DELETE FROM matrix.item")
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
			{"SELECT 1; SELECT 1/0; SELECT 2", nil},
			{"SELECT 1; SELECT $1::int", []any{1}},
		} {
			_, err := conn.ExecContext(ctx, each.query, each.args...)
			var failure *pq.Error
			if !errors.As(err, &failure) {
				panic(fmt.Sprintf("%s: %v", each.query, err))
			}
			told = append(told, fmt.Sprint(
				failure.Severity, failure.Code, failure.Message, failure.Detail,
				failure.Hint, failure.Position, failure.Schema, failure.Table,
				failure.Column, failure.Constraint, failure.Routine,
			))
			cases.Equal(one[int64](ctx, conn, "SELECT 1 + $1::int", 1), int64(2))
		}
	}
	return told
}

func failedTransaction(ctx context.Context, conn *movingConn) any {
	tx := cases.Must(conn.BeginTx(ctx, nil))
	exec(ctx, tx, insert, "lost")
	_, err := tx.ExecContext(ctx, "SELECT 1 / $1::int", 0)
	told := []string{cases.Fails(err, state)}
	_, err = tx.ExecContext(ctx, "SELECT $1::int", 1)
	told = append(told, cases.Fails(err, state))
	// The driver says by itself that a commit would not commit.
	told = append(told, fmt.Sprint(tx.Commit()))
	left := one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
	return append(told, fmt.Sprint(left))
}

const largeBytes = 10_000_000

func largeValues(ctx context.Context, conn *movingConn) any {
	text := strings.Repeat("0123456789", largeBytes/10)
	cases.Equal(one[string](ctx, conn, "SELECT $1::text", text) == text, true)
	raw := []byte(strings.Repeat(string(allBytes()), largeBytes/len(allBytes())))
	back := one[[]byte](ctx, conn, "SELECT $1::bytea", raw)
	cases.Equal(string(back) == string(raw), true)
	return one[int64](ctx, conn, "SELECT $1::int + 1", 1)
}

func manyRows(ctx context.Context, conn *movingConn) any {
	rows := cases.Must(conn.QueryContext(
		ctx, "SELECT n, repeat('x', n % 100) FROM generate_series(1, $1::int) n", 100_000,
	))
	defer rows.Close()
	sum, length := 0, 0
	for rows.Next() {
		var number int
		var text string
		cases.Check(rows.Scan(&number, &text))
		sum += number
		length += len(text)
	}
	cases.Check(rows.Err())
	return []int{sum, length}
}

func rowsLeftUnread(ctx context.Context, conn *movingConn) any {
	for range 3 {
		rows := cases.Must(conn.QueryContext(ctx, "SELECT generate_series(1, $1::int)", 50_000))
		for range 10 {
			cases.Equal(rows.Next(), true)
		}
		cases.Check(rows.Close())
	}
	return one[int64](ctx, conn, "SELECT 1")
}
