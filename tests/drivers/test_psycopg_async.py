"""psycopg 3 on asyncio: connections, pipelines and its pool."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
import pytest
from psycopg import errors
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from tests.drivers.conftest import Database

Connection: TypeAlias = psycopg.AsyncConnection[Any]

MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)
VALUES = (
    (7, "int2"),
    (2**62, "int8"),
    (1.5e300, "float8"),
    (Decimal("12345.0678"), "numeric"),
    (True, "bool"),
    ("ögel 🐘", "text"),
    (bytes(range(256)), "bytea"),
    (MOMENT, "timestamptz"),
    (UUID(int=5), "uuid"),
    ([1, None, 3], "int4[]"),
    ({"a": [1, "ü"]}, "jsonb"),
    (None, "text"),
)


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(
        database.dsn, autocommit=True
    ) as opened:
        yield opened


async def fetch(connection: Connection, query: str, *values: object) -> list[Any]:
    cursor = await connection.execute(query.encode(), values)
    return await cursor.fetchall()


@pytest.mark.parametrize("is_binary", [False, True], ids=["text", "binary"])
async def test_values_come_back_as_they_went(
    connection: Connection, is_binary: bool
) -> None:
    mark = "%b" if is_binary else "%t"
    query = "SELECT " + ", ".join(f"{mark}::{kind}" for _, kind in VALUES)
    values = [Jsonb(value) if isinstance(value, dict) else value for value, _ in VALUES]
    async with connection.cursor(binary=is_binary) as cursor:
        await cursor.execute(query.encode(), values)
        assert await cursor.fetchone() == tuple(value for value, _ in VALUES)


async def test_a_prepared_statement_is_run_again(connection: Connection) -> None:
    for number in range(30):
        cursor = await connection.execute("SELECT %s::int + 1", [number], prepare=True)
        assert await cursor.fetchone() == (number + 1,)


async def test_a_transaction_with_savepoints(connection: Connection) -> None:
    async with connection.transaction(force_rollback=True):
        await connection.execute("INSERT INTO city (name) VALUES ('one')")
        with pytest.raises(errors.UniqueViolation):
            async with connection.transaction():
                await connection.execute("INSERT INTO city (name) VALUES ('one')")
        async with connection.transaction():
            await connection.execute("INSERT INTO city (name) VALUES ('two')")
        rows = await fetch(connection, "SELECT name FROM city ORDER BY id")
        assert rows == [("one",), ("two",)]
    assert await fetch(connection, "SELECT count(*) FROM city") == [(0,)]


@pytest.mark.parametrize("prepare", [False, True])
async def test_a_connection_recovers_from_errors(
    connection: Connection, prepare: bool
) -> None:
    for _ in range(5):
        with pytest.raises(errors.DivisionByZero):
            await connection.execute("SELECT 1/%s::int", [0], prepare=prepare)
        cursor = await connection.execute("SELECT 1/%s::int", [1], prepare=prepare)
        assert await cursor.fetchone() == (1,)


async def test_copy_in_and_out(connection: Connection) -> None:
    rows = [(n, f"name {n}") for n in range(3000)]
    async with (
        connection.transaction(force_rollback=True),
        connection.cursor() as cursor,
    ):
        async with cursor.copy("COPY city FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for row in rows:
                await copy.write_row(row)
        async with cursor.copy("COPY (SELECT * FROM city ORDER BY 1) TO STDOUT") as out:
            out.set_types(["int4", "text"])
            assert [row async for row in out.rows()] == rows


async def test_a_task_that_is_cancelled_cancels_its_query(
    connection: Connection,
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await connection.execute("SELECT pg_sleep(60)")
    assert await fetch(connection, "SELECT 1") == [(1,)]


async def test_a_query_is_cancelled(database: Database, connection: Connection) -> None:
    query = "SELECT pg_sleep(60), 'cancelled by hand'"
    running = asyncio.create_task(connection.execute(query))
    async with await psycopg.AsyncConnection.connect(
        database.direct_dsn, autocommit=True
    ) as other:
        while not await fetch(
            other,
            "SELECT FROM pg_stat_activity WHERE query = %s AND state = 'active'"
            " AND datname = current_database()",
            query,
        ):
            pass
    await connection.cancel_safe(timeout=10)
    with pytest.raises(errors.QueryCanceled):
        await running
    assert await fetch(connection, "SELECT 1") == [(1,)]


async def test_10_mb_there_and_back(connection: Connection) -> None:
    value = bytes(range(250)) * 40_000
    cursor = connection.cursor(binary=True)
    await cursor.execute("SELECT %b::bytea", [value])
    assert await cursor.fetchone() == (value,)


async def test_a_pipeline_answers_in_order(connection: Connection) -> None:
    async with connection.pipeline():
        cursors = [
            await connection.execute("SELECT %s::int", [number], prepare=True)
            for number in range(300)
        ]
        assert [await each.fetchone() for each in cursors] == [
            (number,) for number in range(300)
        ]


async def test_a_pipeline_of_transactions_with_errors(connection: Connection) -> None:
    for _ in range(3):
        async with connection.pipeline() as pipeline:
            async with connection.transaction(force_rollback=True):
                await connection.execute("INSERT INTO city (name) VALUES ('one')")
                with pytest.raises(errors.UniqueViolation):
                    async with connection.transaction():
                        await connection.execute(
                            "INSERT INTO city (name) VALUES ('one')"
                        )
                        await pipeline.sync()
                assert await fetch(connection, "SELECT name FROM city") == [("one",)]
        assert await fetch(connection, "SELECT count(*) FROM city") == [(0,)]


async def test_10_mb_there_and_back_in_a_pipeline(connection: Connection) -> None:
    value = "0123456789" * 1_000_000
    async with connection.pipeline():
        cursors = [
            await connection.execute("SELECT %s::text", [value]) for _ in range(2)
        ]
        assert [await each.fetchone() for each in cursors] == [(value,)] * 2


async def test_a_pool_of_20_runs_1000_queries(database: Database) -> None:
    async with AsyncConnectionPool(database.dsn, min_size=20, max_size=20) as pool:

        async def ask(number: int) -> int:
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT %s::int", [number])
                row = await cursor.fetchone()
                assert row is not None
                found: int = row[0]
                return found

        answers = await asyncio.gather(*map(ask, range(1000)))
    assert answers == list(range(1000))


async def test_notices_and_streams(connection: Connection) -> None:
    heard: list[str | None] = []
    connection.add_notice_handler(lambda diag: heard.append(diag.message_primary))
    await connection.execute("DO $$ BEGIN RAISE NOTICE 'one'; END $$")
    assert heard == ["one"]
    async with connection.cursor() as cursor:
        rows = cursor.stream("SELECT generate_series(1, %s)", [2000])
        assert sum([row[0] async for row in rows]) == 2_001_000
