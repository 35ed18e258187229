package main

import (
	"context"
	"fmt"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func statementsAgain(ctx context.Context, conn *pgx.Conn) any {
	var sums []int32
	for number := range 30 {
		sums = append(sums, one[int32](ctx, conn, "SELECT $1::int + 1", number))
		sums = append(sums, one[int32](ctx, conn, "SELECT $1::int * $2::int", number, 3))
	}
	return sums
}

func manyStatements(ctx context.Context, conn *pgx.Conn) any {
	total := int32(0)
	for range 2 {
		for number := range 300 {
			query := fmt.Sprintf("SELECT $1::int + %d", number)
			total += one[int32](ctx, conn, query, 1)
		}
	}
	cases.Equal(total, int32(2*(300+299*300/2)))
	return total
}

// changedTable runs a statement again whose table has got another column. The
// driver's cached description is stale then, and it may say so once.
func changedTable(ctx context.Context, conn *pgx.Conn) any {
	exec(ctx, conn, "CREATE TABLE matrix.growing (a int)")
	defer conn.Exec(ctx, "DROP TABLE matrix.growing")
	exec(ctx, conn, "INSERT INTO matrix.growing VALUES (1)")
	query := "SELECT * FROM matrix.growing"
	cases.Equal(one[int32](ctx, conn, query), int32(1))
	exec(ctx, conn, "ALTER TABLE matrix.growing ADD b text DEFAULT 'two'")
	for try := 1; ; try++ {
		rows := cases.Must(conn.Query(ctx, query))
		found, err := pgx.CollectExactlyOneRow(rows, pgx.RowToMap)
		if err == nil {
			return found
		}
		cases.Equal(try, 1)
	}
}

func namedStatements(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	var told []any
	for _, text := range []string{"SELECT $1::int + 1", "SELECT $1::text || '!'"} {
		statement := cases.Must(conn.Prepare(ctx, "mine", text))
		told = append(told, statement.ParamOIDs, statement.Fields[0].DataTypeOID)
		for number := range 3 {
			rows := cases.Must(conn.Query(ctx, "mine", fmt.Sprint(number)))
			told = append(told, cases.Must(pgx.CollectRows(rows, pgx.RowTo[any])))
		}
		cases.Check(conn.Deallocate(ctx, "mine"))
		_, err := conn.PgConn().ExecPrepared(
			ctx, "mine", [][]byte{[]byte("1")}, nil, nil,
		).Close()
		told = append(told, cases.Fails(err, state))
	}
	_, err := conn.Prepare(ctx, "wrong", "SELECT wrong syntax here")
	told = append(told, cases.Fails(err, state))
	// The same name twice, which the driver itself would not ask for.
	cases.Must(conn.PgConn().Prepare(ctx, "twice", "SELECT 1", nil))
	_, err = conn.PgConn().Prepare(ctx, "twice", "SELECT 2", nil)
	told = append(told, cases.Fails(err, state))
	return append(told, one[int32](ctx, conn, "SELECT 7"))
}

func manyNamedStatements(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	for number := range 300 {
		text := fmt.Sprintf("SELECT $1::int * %d", number)
		cases.Must(conn.Prepare(ctx, fmt.Sprintf("s%d", number), text))
	}
	for number := range 300 {
		name := fmt.Sprintf("s%d", 299-number)
		cases.Equal(one[int32](ctx, conn, name, 2), int32(2*(299-number)))
	}
	cases.Check(conn.DeallocateAll(ctx))
	_, err := conn.PgConn().ExecPrepared(ctx, "s1", [][]byte{{'1'}}, nil, nil).Close()
	return cases.Fails(err, state)
}

// smallStatementCache has the driver close statements all the time.
func smallStatementCache(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx, func(config *pgx.ConnConfig) { config.StatementCacheCapacity = 8 })
	defer closeAll()
	total := int32(0)
	for number := range 400 {
		query := fmt.Sprintf("SELECT $1::int + %d", number%40)
		total += one[int32](ctx, conn, query, number)
	}
	return total
}

// severalStatements in one simple query, with an error in the middle of another.
func severalStatements(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	var told []string
	for _, query := range []string{
		"SELECT 1; SELECT 'a', 'b'; SET LOCAL work_mem = '5MB'; SELECT 3",
		"SELECT 1; SELECT 1/0; SELECT 3",
		"BEGIN; SELECT 4; COMMIT; SELECT 5",
		"",
		"/* nothing */ ; ;",
	} {
		results, err := conn.PgConn().Exec(ctx, query).ReadAll()
		for _, result := range results {
			told = append(told, result.CommandTag.String(), fmt.Sprintf("%s", result.Rows))
		}
		told = append(told, state(err))
	}
	return told
}

func tagOf(tag pgconn.CommandTag, err error) string {
	return cases.Must(tag, err).String()
}
