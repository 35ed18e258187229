package main

import (
	"context"
	"database/sql"
	"fmt"
	"strings"

	"drivers/cases"
)

const copyItems = "COPY matrix.item (id, name) FROM STDIN"

// copyIn gives the driver rows to write.
func copyIn(ctx context.Context, conn *movingConn) any {
	defer conn.ExecContext(ctx, "DELETE FROM matrix.item")
	conn.move(ctx)
	tx := cases.Must(conn.BeginTx(ctx, nil))
	statement := cases.Must(tx.PrepareContext(ctx, copyItems))
	for number := range 20_000 {
		cases.Must(statement.ExecContext(ctx, number, fmt.Sprintf("name\t%d\n\\", number)))
	}
	cases.Equal(cases.Must(statement.Exec()) == nil, false)
	cases.Check(statement.Close())
	cases.Check(tx.Commit())
	return one[string](
		ctx, conn, "SELECT md5(string_agg(id || name, '' ORDER BY id)) FROM matrix.item",
	)
}

func copyRefused(ctx context.Context, conn *movingConn) any {
	var told []string
	for _, query := range []string{copyItems, "COPY matrix.nowhere FROM STDIN"} {
		conn.move(ctx)
		tx := cases.Must(conn.BeginTx(ctx, nil))
		told = append(told, cases.Fails(fill(ctx, tx, query), state))
		cases.Check(tx.Rollback())
		cases.Equal(one[int64](ctx, conn, "SELECT count(*) FROM matrix.item"), int64(0))
	}
	return told
}

// fill copies much that no integer column takes.
func fill(ctx context.Context, tx *sql.Tx, query string) error {
	statement, err := tx.PrepareContext(ctx, query)
	if err != nil {
		return err
	}
	defer statement.Close()
	for range 20_000 {
		if _, err = statement.ExecContext(ctx, "no number", strings.Repeat("x", 20)); err != nil {
			return err
		}
	}
	_, err = statement.ExecContext(ctx)
	return err
}
