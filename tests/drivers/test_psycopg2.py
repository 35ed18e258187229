"""psycopg2: simple protocol only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from psycopg2.extensions import ISOLATION_LEVEL_SERIALIZABLE, connection
from psycopg2.extras import execute_values

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
