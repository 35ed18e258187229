package main

import (
	"context"
	"math"
	"math/big"
	"net/netip"
	"reflect"
	"strings"
	"time"

	"drivers/cases"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

type sample struct {
	kind  string
	value any
}

func to[T any](value T) *T { return &value }

// samples are values that come back as they went, whatever the format.
var samples = []sample{
	{"int2", int16(-32768)},
	{"int4", int32(math.MaxInt32)},
	{"int8", int64(math.MinInt64)},
	{"float4", float32(1.5e-30)},
	{"float8", 1.0 / 3},
	{"float8", math.Inf(1)},
	{"float8", math.Inf(-1)},
	{"numeric", pgtype.Numeric{Int: big.NewInt(123456789000000001), Exp: -9, Valid: true}},
	{"numeric", pgtype.Numeric{NaN: true, Valid: true}},
	{"numeric", pgtype.Numeric{InfinityModifier: pgtype.NegativeInfinity, Valid: true}},
	{"bool", true},
	{"text", "ögel 🐘 'single' \"double\" \\back $1 \n"},
	{"text", ""},
	{"bytea", allBytes()},
	{"bytea", []byte{}},
	{"date", pgtype.Date{Time: time.Date(2026, 2, 28, 0, 0, 0, 0, time.UTC), Valid: true}},
	{"date", pgtype.Date{InfinityModifier: pgtype.Infinity, Valid: true}},
	{"time", pgtype.Time{Microseconds: 86_399_999_999, Valid: true}},
	{"timestamp", pgtype.Timestamp{Time: moment, Valid: true}},
	{"timestamptz", pgtype.Timestamptz{Time: moment, Valid: true}},
	{"interval", pgtype.Interval{Months: 14, Days: 3, Microseconds: 4_000_005, Valid: true}},
	{"uuid", pgtype.UUID{Bytes: [16]byte{0: 0xfe, 15: 1}, Valid: true}},
	{"jsonb", map[string]any{"a": []any{1.0, 2.5, nil, "ü"}, "b": map[string]any{"c": true}}},
	{"json", map[string]any{"quote": "'\"\\"}},
	{"int4[]", []*int32{to(int32(1)), nil, to(int32(3))}},
	{"text[]", []string{"a", `b"c`, "{}", "NULL", "ü,", ""}},
	{"float8[]", []float64{1, math.Inf(1)}},
	{"int4range", pgtype.Range[pgtype.Int4]{
		Lower: pgtype.Int4{Int32: 1, Valid: true}, LowerType: pgtype.Inclusive,
		Upper: pgtype.Int4{Int32: 9, Valid: true}, UpperType: pgtype.Exclusive, Valid: true,
	}},
	{"inet", netip.MustParsePrefix("2001:db8::1/64")},
	{"point", pgtype.Point{P: pgtype.Vec2{X: 1.5, Y: -2}, Valid: true}},
	{"varbit", pgtype.Bits{Bytes: []byte{0b1010_0000}, Len: 3, Valid: true}},
	{"matrix.mood", "sad"},
	{"text", (*string)(nil)},
	{"int8", (*int64)(nil)},
}

var moment = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)

func allBytes() []byte {
	all := make([]byte, 256)
	for index := range all {
		all[index] = byte(index)
	}
	return all
}

// values sends and asks for values in the formats that the way of running chooses.
func values(ctx context.Context, conn *pgx.Conn) any {
	return exchange(ctx, conn)
}

// valuesAsText asks for results as text instead.
func valuesAsText(ctx context.Context, conn *pgx.Conn) any {
	return exchange(ctx, conn, pgx.QueryResultFormats{pgx.TextFormatCode})
}

func exchange(ctx context.Context, conn *pgx.Conn, options ...any) any {
	mood := cases.Must(conn.LoadType(ctx, "matrix.mood"))
	conn.TypeMap().RegisterType(mood)
	// Not every way of running a query asks the server for its parameters' types.
	conn.TypeMap().RegisterDefaultPgType(map[string]any{}, "jsonb")
	var told []string
	for _, each := range samples {
		query := strings.ReplaceAll("SELECT $1::KIND, $1::KIND::text", "KIND", each.kind)
		back := reflect.New(reflect.TypeOf(each.value))
		var text *string
		row := conn.QueryRow(ctx, query, append(options[:len(options):len(options)], each.value)...)
		cases.Check(row.Scan(back.Interface(), &text))
		got := back.Elem().Interface()
		if stamp, ok := got.(pgtype.Timestamptz); ok {
			stamp.Time = stamp.Time.UTC()
			got = stamp
		}
		cases.Equal(got, each.value)
		if text != nil {
			told = append(told, *text)
		}
	}
	// NaN is equal to nothing.
	for _, kind := range []string{"float4", "float8"} {
		query := "SELECT $1::" + kind
		cases.Equal(math.IsNaN(one[float64](ctx, conn, query, append(options[:len(options):len(options)], math.NaN())...)), true)
	}
	return told
}

const largeBytes = 10_000_000

func largeValues(ctx context.Context, conn *pgx.Conn) any {
	text := strings.Repeat("0123456789", largeBytes/10)
	cases.Equal(one[string](ctx, conn, "SELECT $1::text", text) == text, true)
	raw := []byte(strings.Repeat(string(allBytes()), largeBytes/len(allBytes())))
	back := one[[]byte](ctx, conn, "SELECT $1::bytea", raw)
	cases.Equal(string(back) == string(raw), true)
	// And the connection is as good as before.
	return one[int32](ctx, conn, "SELECT $1::int + 1", 1)
}
