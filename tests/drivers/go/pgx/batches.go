package main

import (
	"context"
	"fmt"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func batch(ctx context.Context, conn *pgx.Conn) any {
	total := int32(0)
	for range 3 {
		queue := &pgx.Batch{}
		for number := range 200 {
			query := fmt.Sprintf("SELECT $1::int * %d", number%7)
			queue.Queue(query, number).QueryRow(func(row pgx.Row) error {
				var product int32
				err := row.Scan(&product)
				cases.Equal(product, int32(number*(number%7)))
				total += product
				return err
			})
		}
		queue.Queue(insert, "batched")
		queue.Queue("DELETE FROM matrix.item WHERE name = $1", "batched")
		cases.Check(conn.SendBatch(ctx, queue).Close())
	}
	return total
}

// batchWithError has an error in its middle, which undoes what stands before it.
func batchWithError(ctx context.Context, conn *pgx.Conn) any {
	var told []string
	for range 3 {
		queue := &pgx.Batch{}
		queue.Queue(insert, "before")
		queue.Queue("SELECT 1 / $1::int", 0)
		queue.Queue(insert, "behind")
		results := conn.SendBatch(ctx, queue)
		for range 3 {
			_, err := results.Exec()
			told = append(told, state(err))
		}
		told = append(told, state(results.Close()))
		told = append(told, string(conn.PgConn().TxStatus()))
		left := one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")
		cases.Equal(left, int64(0))
	}
	// One that does not even parse.
	queue := &pgx.Batch{}
	queue.Queue(insert, "before")
	queue.Queue("SELECT wrong syntax here")
	told = append(told, cases.Fails(conn.SendBatch(ctx, queue).Close(), state))
	cases.Equal(one[int64](ctx, conn, "SELECT count(*) FROM matrix.item"), int64(0))
	return told
}

func batchInTransaction(ctx context.Context, conn *pgx.Conn) any {
	tx := cases.Must(conn.Begin(ctx))
	queue := &pgx.Batch{}
	for number := range 20 {
		queue.Queue(insert, fmt.Sprint(number))
	}
	cases.Check(tx.SendBatch(ctx, queue).Close())
	count := one[int64](ctx, tx, "SELECT count(*) FROM matrix.item")
	queue = &pgx.Batch{}
	queue.Queue(insert, "1")
	queue.Queue(insert, "another")
	failure := cases.Fails(tx.SendBatch(ctx, queue).Close(), state)
	status := string(conn.PgConn().TxStatus())
	cases.Check(tx.Rollback(ctx))
	return []any{count, failure, status}
}

func batchBeginsTransaction(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	queue := &pgx.Batch{}
	queue.BeginTx(pgx.TxOptions{})
	queue.Queue(insert, "begun")
	results := conn.SendBatch(ctx, queue)
	tx := results.Tx()
	cases.Check(results.Close())
	count := one[int64](ctx, tx, "SELECT count(*) FROM matrix.item")
	cases.Check(tx.Rollback(ctx))
	return []any{count, one[int64](ctx, conn, "SELECT count(*) FROM matrix.item")}
}

// pipeline sends in several parts and reads between them.
func pipeline(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	pipe := conn.PgConn().StartPipeline(ctx)
	var told []string
	for number := range 100 {
		parameter := [][]byte{[]byte(fmt.Sprint(number))}
		pipe.SendQueryParams("SELECT $1::int + 1", parameter, nil, nil, nil)
		if number%10 == 9 {
			cases.Check(pipe.Sync())
		}
	}
	for {
		result := cases.Must(pipe.GetResults())
		if result == nil {
			break
		}
		told = append(told, show(result))
	}
	// Without a Sync, only flushed.
	pipe.SendQueryParams("SELECT 'flushed'", nil, nil, nil, nil)
	pipe.SendFlushRequest()
	cases.Check(pipe.Flush())
	told = append(told, show(cases.Must(pipe.GetResults())))
	cases.Check(pipe.Sync())
	told = append(told, show(cases.Must(pipe.GetResults())))
	cases.Check(pipe.Close())
	return append(told, string(conn.PgConn().TxStatus()))
}

func pipelineOfStatements(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	pipe := conn.PgConn().StartPipeline(ctx)
	var told []string
	for number := range 40 {
		name := fmt.Sprintf("p%d", number%5)
		if number < 5 {
			pipe.SendPrepare(name, fmt.Sprintf("SELECT $1::text || '%d'", number), nil)
		}
		pipe.SendQueryPrepared(name, [][]byte{[]byte(fmt.Sprint(number))}, nil, nil)
	}
	for number := range 5 {
		pipe.SendDeallocate(fmt.Sprintf("p%d", number))
	}
	pipe.SendPrepare("p1", "SELECT 'another one'", nil)
	pipe.SendQueryPrepared("p1", nil, nil, nil)
	cases.Check(pipe.Sync())
	for {
		result := cases.Must(pipe.GetResults())
		if result == nil {
			break
		}
		told = append(told, show(result))
	}
	cases.Check(pipe.Close())
	return told
}

func pipelineWithError(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	var told []string
	for range 3 {
		pipe := conn.PgConn().StartPipeline(ctx)
		for _, divisor := range []string{"1", "0", "2"} {
			parameter := [][]byte{[]byte(divisor)}
			pipe.SendQueryParams("SELECT 6 / $1::int", parameter, nil, nil, nil)
		}
		pipe.SendPrepare("never", "SELECT 1", nil)
		pipe.SendPipelineSync()
		pipe.SendQueryParams("SELECT 'behind the sync'", nil, nil, nil, nil)
		cases.Check(pipe.Sync())
		for syncs := 0; syncs < 2; {
			result, err := pipe.GetResults()
			if err != nil {
				told = append(told, cases.Fails(err, state))
				continue
			}
			told = append(told, show(result))
			if _, ok := result.(*pgconn.PipelineSync); ok {
				syncs++
			}
		}
		cases.Check(pipe.Close())
	}
	return told
}

// show renders one answer in a pipeline.
func show(result any) string {
	if reader, ok := result.(*pgconn.ResultReader); ok {
		read := reader.Read()
		return fmt.Sprintf("%s %s %s", read.Rows, read.CommandTag, state(read.Err))
	}
	return fmt.Sprintf("%T", result)
}
