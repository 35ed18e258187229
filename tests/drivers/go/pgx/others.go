package main

import "drivers/cases"

// testOthers adds the cases that are the same in each way of running a query.
func testOthers() {
	test := cases.Test
	test("named statements", namedStatements)
	test("300 named statements", manyNamedStatements)
	test("small statement cache", smallStatementCache)
	test("several statements", severalStatements)
	test("batch begins transaction", batchBeginsTransaction)
	test("pipeline", pipeline)
	test("pipeline of statements", pipelineOfStatements)
	test("pipeline with error", pipelineWithError)
	test("copy raw", copyRaw)
	test("copy binary", copyBinary)
	test("copy broken off", copyBrokenOff)
	test("copy refused", copyRefused)
	test("cancel request", cancelRequest)
	test("context cancels", contextCancels)
	test("context closes", contextCloses)
	test("cursor", cursor)
	test("cursor with hold", cursorWithHold)
	test("large object", largeObject)
	test("notices", notices)
	test("listen", listen)
	test("start-up settings", startupSettings)
	test("settings last", settingsLast)
	test("temporary table", temporaryTable)
	test("latest protocol", latestProtocol)
	test("pool", pool)
	test("pool of transactions", poolOfTransactions)
	test("pool after cancels", poolAfterCancels)
	test("database/sql", databaseSQL)
}
