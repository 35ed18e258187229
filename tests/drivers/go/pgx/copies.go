package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
)

func copyFrom(ctx context.Context, conn *pgx.Conn) any {
	defer conn.Exec(ctx, "DELETE FROM matrix.item")
	table := pgx.Identifier{"matrix", "item"}
	columns := []string{"id", "name"}
	rows := pgx.CopyFromSlice(20_000, func(index int) ([]any, error) {
		return []any{index, fmt.Sprintf("name\t%d\n\\", index)}, nil
	})
	copied := cases.Must(conn.CopyFrom(ctx, table, columns, rows))
	cases.Equal(copied, int64(20_000))
	digest := one[string](
		ctx, conn, "SELECT md5(string_agg(id || name, '' ORDER BY id)) FROM matrix.item",
	)
	// A row that violates a constraint undoes all of them.
	_, err := conn.CopyFrom(ctx, table, columns, pgx.CopyFromRows([][]any{{-1, "x"}, {1, "y"}}))
	failure := cases.Fails(err, state)
	count := one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
	return []any{digest, failure, count}
}

func copyRaw(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	defer conn.Exec(ctx, "DELETE FROM matrix.item")
	var rows strings.Builder
	for number := range 50_000 {
		fmt.Fprintf(&rows, "%d,\"a \"\"quoted\"\" name, %d\"\n", number, number)
	}
	raw := conn.PgConn()
	in := tagOf(raw.CopyFrom(
		ctx, strings.NewReader(rows.String()), "COPY matrix.item (id, name) FROM STDIN (FORMAT csv)",
	))
	var out bytes.Buffer
	query := "COPY (SELECT id, name FROM matrix.item ORDER BY id) TO STDOUT (FORMAT csv)"
	back := tagOf(raw.CopyTo(ctx, &out, query))
	cases.Equal(out.String() == rows.String(), true)
	return []any{in, back, out.Len()}
}

// copyBinary copies out of one transaction and back within another.
func copyBinary(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	raw := conn.PgConn()
	var out bytes.Buffer
	query := "COPY (SELECT n, 'name ' || n FROM generate_series(1, 5000) n)" +
		" TO STDOUT (FORMAT binary)"
	cases.Must(raw.CopyTo(ctx, &out, query))
	size := out.Len()
	tx := cases.Must(conn.Begin(ctx))
	cases.Must(raw.CopyFrom(ctx, &out, "COPY matrix.item (id, name) FROM STDIN (FORMAT binary)"))
	sum := one[int64](ctx, tx, "SELECT sum(id) FROM matrix.item")
	cases.Check(tx.Rollback(ctx))
	return []any{size, sum}
}

// copyBrokenOff has the source of the rows fail.
func copyBrokenOff(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	broken := errors.New("the source is dry")
	source := io.MultiReader(strings.NewReader("1\tone\n"), failing{broken})
	_, err := conn.PgConn().CopyFrom(ctx, source, "COPY matrix.item (id, name) FROM STDIN")
	cases.Equal(err == nil, false)
	return one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
}

type failing struct{ err error }

func (source failing) Read([]byte) (int, error) { return 0, source.err }

// copyRefused has the server refuse early what the driver sends much of.
func copyRefused(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	var told []string
	for _, query := range []string{
		"COPY matrix.item (id, name) FROM STDIN",
		"COPY matrix.nowhere FROM STDIN",
		"COPY (SELECT 1/0) TO STDOUT",
	} {
		rows := strings.NewReader(strings.Repeat("not a number\tx\n", 100_000))
		_, err := conn.PgConn().CopyFrom(ctx, rows, query)
		told = append(told, cases.Fails(err, state))
	}
	var out bytes.Buffer
	_, err := conn.PgConn().CopyTo(ctx, &out, "COPY (SELECT 1/(3-n) FROM generate_series(1, 9) n) TO STDOUT")
	told = append(told, cases.Fails(err, state), out.String())
	cases.Equal(one[int64](ctx, conn, "SELECT count(*) FROM matrix.item"), int64(0))
	return told
}
