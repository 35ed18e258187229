package main

import (
	"context"
	"io"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
)

func manyRows(ctx context.Context, conn *pgx.Conn) any {
	rows := cases.Must(conn.Query(
		ctx, "SELECT n, repeat('x', n % 100) FROM generate_series(1, $1::int) n", 100_000,
	))
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

// rowsLeftUnread closes a result early, which reads the rest and throws it away.
func rowsLeftUnread(ctx context.Context, conn *pgx.Conn) any {
	for range 3 {
		rows := cases.Must(conn.Query(ctx, "SELECT generate_series(1, $1::int)", 50_000))
		for range 10 {
			cases.Equal(rows.Next(), true)
		}
		rows.Close()
		cases.Check(rows.Err())
	}
	return one[int32](ctx, conn, "SELECT 1")
}

func cursor(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	tx := cases.Must(conn.Begin(ctx))
	defer tx.Rollback(ctx)
	exec(ctx, tx, "DECLARE walk SCROLL CURSOR FOR SELECT generate_series(1, 1000)")
	var told []int
	for _, query := range []string{
		"FETCH 300 FROM walk", "FETCH 300 FROM walk", "MOVE BACKWARD ALL IN walk",
		"FETCH LAST FROM walk", "FETCH PRIOR FROM walk", "FETCH ABSOLUTE 7 FROM walk",
	} {
		rows := cases.Must(tx.Query(ctx, query))
		numbers := cases.Must(pgx.CollectRows(rows, pgx.RowTo[int]))
		sum := 0
		for _, number := range numbers {
			sum += number
		}
		told = append(told, len(numbers), sum)
	}
	return told
}

func cursorWithHold(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	exec(ctx, conn, "DECLARE kept CURSOR WITH HOLD FOR SELECT generate_series(1, 10)")
	rows := cases.Must(conn.Query(ctx, "FETCH 4 FROM kept"))
	first := cases.Must(pgx.CollectRows(rows, pgx.RowTo[int]))
	rows = cases.Must(conn.Query(ctx, "FETCH ALL FROM kept"))
	rest := cases.Must(pgx.CollectRows(rows, pgx.RowTo[int]))
	exec(ctx, conn, "CLOSE kept")
	return []any{first, rest}
}

func largeObject(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	tx := cases.Must(conn.Begin(ctx))
	defer tx.Rollback(ctx)
	objects := tx.LargeObjects()
	id := cases.Must(objects.Create(ctx, 0))
	object := cases.Must(objects.Open(ctx, id, pgx.LargeObjectModeRead|pgx.LargeObjectModeWrite))
	content := make([]byte, 3_000_000)
	for index := range content {
		content[index] = byte(index * 7)
	}
	cases.Must(object.Write(content))
	cases.Must(object.Seek(0, io.SeekStart))
	back := cases.Must(io.ReadAll(object))
	cases.Equal(string(back) == string(content), true)
	cases.Check(object.Truncate(10))
	return cases.Must(object.Seek(0, io.SeekEnd))
}
