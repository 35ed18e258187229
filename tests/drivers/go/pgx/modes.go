package main

import (
	"context"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
)

// testMode adds the cases of one of the driver's ways of running a query.
func testMode(mode string) {
	test := func(name string, run func(context.Context, *pgx.Conn) any) {
		cases.Test(name, func(ctx context.Context) any {
			conn, closeAll := connectMoving(ctx, func(config *pgx.ConnConfig) {
				config.DefaultQueryExecMode = modes[mode]
			})
			defer closeAll()
			return run(ctx, conn)
		})
	}
	test("values", values)
	test("values as text", valuesAsText)
	test("statements again", statementsAgain)
	test("300 statements", manyStatements)
	test("savepoints", savepoints)
	test("errors", errorsAndRecovery)
	test("failed transaction", failedTransaction)
	test("batch", batch)
	test("batch with error", batchWithError)
	test("batch in transaction", batchInTransaction)
	test("copy from", copyFrom)
	test("large values", largeValues)
	test("many rows", manyRows)
	test("rows left unread", rowsLeftUnread)
	test("changed table", changedTable)
}

var modes = map[string]pgx.QueryExecMode{
	"cache_statement": pgx.QueryExecModeCacheStatement,
	"cache_describe":  pgx.QueryExecModeCacheDescribe,
	"describe_exec":   pgx.QueryExecModeDescribeExec,
	"exec":            pgx.QueryExecModeExec,
	"simple_protocol": pgx.QueryExecModeSimpleProtocol,
}
