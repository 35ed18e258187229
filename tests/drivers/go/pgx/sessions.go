package main

import (
	"context"
	"fmt"
	"time"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func notices(ctx context.Context) any {
	var heard []string
	conn, closeAll := connectMoving(ctx, func(config *pgx.ConnConfig) {
		config.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
			heard = append(heard, notice.Severity+notice.Code+notice.Message)
		}
	})
	defer closeAll()
	exec(ctx, conn, "DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'zwei: ü'; END $$")
	exec(ctx, conn, "DROP TABLE IF EXISTS matrix.nowhere")
	return heard
}

// listen hears what other connections tell, also while it does something else.
func listen(ctx context.Context) any {
	conn := connect(ctx)
	defer conn.Close(ctx)
	other := connect(ctx)
	defer other.Close(ctx)
	exec(ctx, conn, "LISTEN drivers")
	var heard []string
	hear := func() {
		waiting, end := context.WithTimeout(ctx, 5*time.Second)
		defer end()
		note := cases.Must(conn.WaitForNotification(waiting))
		heard = append(heard, note.Channel+": "+note.Payload)
	}
	for number := range 3 {
		exec(ctx, other, "SELECT pg_notify('drivers', $1)", fmt.Sprint("told ", number))
		hear()
	}
	exec(ctx, other, "NOTIFY drivers, 'before a query'")
	cases.Equal(one[int32](ctx, conn, "SELECT 1"), int32(1))
	hear()
	exec(ctx, conn, "NOTIFY drivers, 'to itself'")
	hear()
	exec(ctx, conn, "UNLISTEN *")
	exec(ctx, other, "NOTIFY drivers, 'to nobody'")
	return heard
}

// startupSettings are part of the URL or of the start-up packet.
func startupSettings(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx, func(config *pgx.ConnConfig) {
		config.RuntimeParams["application_name"] = "drivers ü"
		config.RuntimeParams["search_path"] = "matrix, public"
		config.RuntimeParams["options"] = "-c work_mem=7MB -c DateStyle=SQL,DMY"
		config.RuntimeParams["timezone"] = "Asia/Kathmandu"
	})
	defer closeAll()
	var told []string
	for range 3 {
		for _, name := range []string{
			"application_name", "search_path", "work_mem", "DateStyle", "TimeZone",
		} {
			told = append(told, one[string](ctx, conn, "SHOW "+name))
		}
		told = append(told, conn.PgConn().ParameterStatus("DateStyle"))
		told = append(told, conn.PgConn().ParameterStatus("TimeZone"))
		told = append(told, one[string](ctx, conn, "SELECT 'item'::regclass::text"))
	}
	return told
}

// settingsLast has ten connections at once, each with settings of its own.
func settingsLast(ctx context.Context) any {
	told := make([][]string, 10)
	cases.InParallel(len(told), len(told), func(index int) {
		conn := connect(ctx)
		defer conn.Close(ctx)
		exec(ctx, conn, fmt.Sprintf("SET application_name = 'number %d'", index))
		exec(ctx, conn, fmt.Sprintf("SET search_path = schema_%d, public", index))
		exec(ctx, conn, "SELECT set_config('my.number', $1, false)", fmt.Sprint(index))
		for range 20 {
			told[index] = append(told[index],
				one[string](ctx, conn, "SHOW search_path"),
				one[string](ctx, conn, "SHOW application_name"),
				one[string](ctx, conn, "SELECT current_setting('my.number', true)"),
			)
		}
		exec(ctx, conn, "RESET search_path")
		told[index] = append(told[index], one[string](ctx, conn, "SHOW search_path"))
	})
	for index, texts := range told {
		for round := range 20 {
			cases.Equal(texts[3*round:3*round+3], []string{
				fmt.Sprintf("schema_%d, public", index),
				fmt.Sprintf("number %d", index),
				fmt.Sprint(index),
			})
		}
		cases.Equal(texts[60], `"$user", public`)
	}
	return nil
}

func temporaryTable(ctx context.Context) any {
	conn, closeAll := connectMoving(ctx)
	defer closeAll()
	exec(ctx, conn, "CREATE TEMPORARY TABLE mine (a int)")
	for number := range 5 {
		exec(ctx, conn, "INSERT INTO mine VALUES ($1)", number)
	}
	sum := one[int64](ctx, conn, "SELECT sum(a) FROM mine")
	exec(ctx, conn, "DROP TABLE mine")
	return sum
}

func latestProtocol(ctx context.Context) any {
	config := cases.Must(pgx.ParseConfig(cases.URL()))
	config.MaxProtocolVersion = "latest"
	conn := cases.Must(pgx.ConnectConfig(ctx, config))
	defer conn.Close(ctx)
	query := "SELECT pg_sleep(60) /* latest protocol */"
	err := whileItRuns(ctx, conn, query, func() {
		cases.Check(conn.PgConn().CancelRequest(ctx))
	})
	return cases.Fails(err, state)
}
