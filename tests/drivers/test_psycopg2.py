"""psycopg2: simple protocol only."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from threading import Semaphore
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from psycopg2.extensions import ISOLATION_LEVEL_SERIALIZABLE, connection
from psycopg2.extras import Json, execute_values
from psycopg2.pool import ThreadedConnectionPool

from tests.drivers.conftest import Database


@pytest.fixture
def connected(database: Database) -> Iterator[connection]:
    opened = psycopg2.connect(database.dsn)
    try:
        yield opened
    finally:
        opened.close()


def fetch(opened: connection, query: str, values: Any = None) -> list[Any]:
    with opened.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()


def test_values_come_back_as_they_went(connected: connection) -> None:
    row = fetch(connected, "SELECT %s, %s, %s, %s", (1, "it's", None, [1, 2]))
    assert row == [(1, "it's", None, [1, 2])]


def test_a_transaction_is_rolled_back(connected: connection) -> None:
    with connected.cursor() as cursor:
        execute_values(
            cursor,
            "INSERT INTO city (name) VALUES %s",
            [(f"p{n}",) for n in range(250)],
        )
        cursor.execute("SELECT count(*) FROM city")
        assert cursor.fetchone() == (250,)
    connected.rollback()
    assert fetch(connected, "SELECT count(*) FROM city") == [(0,)]


def test_an_error_fails_the_transaction_until_its_rollback(
    connected: connection,
) -> None:
    with pytest.raises(psycopg2.errors.UndefinedTable):
        fetch(connected, "SELECT * FROM nowhere")
    with pytest.raises(psycopg2.errors.InFailedSqlTransaction):
        fetch(connected, "SELECT 1")
    connected.rollback()
    assert fetch(connected, "SELECT 1") == [(1,)]


def test_copy_in_and_out(connected: connection) -> None:
    text = "".join(f"{n}\tname {n}\n" for n in range(2000))
    with connected.cursor() as cursor:
        cursor.copy_expert("COPY city FROM STDIN", io.StringIO(text))
        out = io.StringIO()
        cursor.copy_expert("COPY (SELECT * FROM city ORDER BY id) TO STDOUT", out)
    connected.rollback()
    assert out.getvalue() == text


def test_a_named_cursor(connected: connection) -> None:
    with connected.cursor("walk") as cursor:
        cursor.itersize = 50
        cursor.execute("SELECT generate_series(1, 500)")
        assert sum(row[0] for row in cursor) == 125_250


def test_notices_arrive(connected: connection) -> None:
    with connected.cursor() as cursor:
        cursor.execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
    assert [str(each).strip() for each in connected.notices] == ["NOTICE:  hello"]


def test_an_isolation_level(connected: connection) -> None:
    connected.set_isolation_level(ISOLATION_LEVEL_SERIALIZABLE)
    assert fetch(connected, "SHOW transaction_isolation") == [("serializable",)]
    connected.rollback()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("smallint", -7),
        ("bigint", 2**62),
        ("float8", 1.5e300),
        ("numeric", Decimal("12345.0678")),
        ("bool", True),
        ("text", "ögel 🐘 \\ ' \n"),
        ("date", datetime.date(2026, 2, 28)),
        ("timestamptz", datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)),
        ("interval", datetime.timedelta(days=3, seconds=4)),
        ("int[]", [1, None, 3]),
        ("text[]", ["a", 'b"c', "{}"]),
        ("jsonb", {"a": [1, "ü"]}),
        ("text", None),
    ],
)
def test_a_value_comes_back_as_it_went(
    connected: connection, kind: str, value: object
) -> None:
    sent = Json(value) if isinstance(value, dict) else value
    assert fetch(connected, f"SELECT %s::{kind}", [sent]) == [(value,)]


def test_bytes_come_back_as_they_went(connected: connection) -> None:
    value = bytes(range(256))
    row = fetch(connected, "SELECT %s::bytea", [psycopg2.Binary(value)])[0]
    assert bytes(row[0]) == value


def test_savepoints(connected: connection) -> None:
    with connected.cursor() as cursor:
        cursor.execute("INSERT INTO city (name) VALUES ('one')")
        cursor.execute("SAVEPOINT before")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            cursor.execute("INSERT INTO city (name) VALUES ('one')")
        cursor.execute("ROLLBACK TO before")
        cursor.execute("SELECT count(*) FROM city")
        assert cursor.fetchone() == (1,)
    connected.rollback()


def test_a_statement_prepared_by_sql_in_a_transaction(connected: connection) -> None:
    with connected.cursor() as cursor:
        cursor.execute("PREPARE twice (int) AS SELECT $1 * 2")
        for number in range(30):
            cursor.execute("EXECUTE twice (%s)", [number])
            assert cursor.fetchone() == (number * 2,)
        cursor.execute("DEALLOCATE twice")
    connected.rollback()


def test_a_query_is_cancelled(database: Database, connected: connection) -> None:
    def cancel_once_it_runs() -> None:
        other = psycopg2.connect(database.direct_dsn)
        other.autocommit = True
        while not fetch(
            other,
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active'"
            " AND query = 'SELECT pg_sleep(61)' AND datname = current_database()",
        ):
            pass
        other.close()
        connected.cancel()

    with ThreadPoolExecutor(1) as pool:
        canceller = pool.submit(cancel_once_it_runs)
        with pytest.raises(psycopg2.errors.QueryCanceled):
            fetch(connected, "SELECT pg_sleep(61)")
        canceller.result()
    connected.rollback()
    assert fetch(connected, "SELECT 1") == [(1,)]


def test_10_mb_there_and_back(connected: connection) -> None:
    value = "0123456789" * 1_000_000
    assert fetch(connected, "SELECT %s", [value]) == [(value,)]


def test_a_pool_of_20_runs_1000_queries(database: Database) -> None:
    pool = ThreadedConnectionPool(20, 20, database.dsn)
    places = Semaphore(20)

    def ask(number: int) -> Any:
        with places:
            borrowed = pool.getconn()
            try:
                with borrowed:
                    return fetch(borrowed, "SELECT %s", [number])[0][0]
            finally:
                pool.putconn(borrowed)

    try:
        with ThreadPoolExecutor(30) as threads:
            assert list(threads.map(ask, range(1000))) == list(range(1000))
    finally:
        pool.closeall()
