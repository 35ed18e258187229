"""asyncpg: extended protocol, binary, statements prepared throughout."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from ipaddress import IPv4Address
from typing import TypeAlias
from uuid import UUID

import asyncpg
import pytest

from tests.drivers.conftest import Database

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    opened: Connection = await asyncpg.connect(database.dsn)
    try:
        yield opened
    finally:
        await opened.close()


async def test_values_come_back_as_they_went(connection: Connection) -> None:
    moment = datetime.datetime(2026, 5, 6, 7, 8, 9, 10, datetime.UTC)
    values = (1, "text", b"\0\1", 2.5, Decimal("1.25"), moment, [1, 2], None, {"a"})
    row = await connection.fetchrow(
        "SELECT $1::int8, $2::text, $3::bytea, $4::float8, $5::numeric,"
        " $6::timestamptz, $7::int[], $8::text",
        *values[:8],
    )
    assert row is not None and tuple(row) == values[:8]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int2", -(2**15)),
        ("float4", 1.5),
        ("bool", True),
        ("date", datetime.date(2026, 2, 28)),
        ("time", datetime.time(23, 59, 59, 999_999)),
        ("timestamp", datetime.datetime(2026, 1, 2, 3, 4, 5, 6)),
        ("interval", datetime.timedelta(days=3, seconds=4, microseconds=5)),
        ("uuid", UUID(int=2**127 + 5)),
        ("text[]", ["a", None, 'b"c', "{}"]),
        ("int8[]", [[1, 2], [3, 4]]),
        ("point", asyncpg.Point(1.5, -2)),
        ("bit(5)", asyncpg.BitString("10110")),  # type: ignore[arg-type]
        ("int4range", asyncpg.Range(1, 5)),
        ("inet", IPv4Address("192.168.1.5")),
    ],
)
async def test_a_value_comes_back_as_it_went(
    connection: Connection, kind: str, value: object
) -> None:
    assert await connection.fetchval(f"SELECT $1::{kind}", value) == value


async def test_values_in_text_come_back_as_they_went(connection: Connection) -> None:
    # A look-up by SQL, then text both ways, in what is binary else.
    async with connection.transaction():
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
        )
        tree = {"a": [1, 2.5, None, "ü"]}
        assert await connection.fetchval("SELECT $1::jsonb", tree) == tree


async def test_one_statement_many_times(connection: Connection) -> None:
    statement = await connection.prepare("SELECT $1::int * 2")
    for number in range(50):
        assert await statement.fetchval(number) == number * 2


async def test_statements_of_the_cache_are_told_apart(
    connection: Connection,
) -> None:
    for number in range(150):
        assert await connection.fetchval(f"SELECT {number % 40} + $1::int", 1) == (
            number % 40 + 1
        )


async def test_more_statements_than_the_cache_holds(database: Database) -> None:
    connection: Connection = await asyncpg.connect(database.dsn, statement_cache_size=3)
    try:
        for number in range(60):
            query = f"SELECT {number % 8} + $1::int"
            assert await connection.fetchval(query, 1) == number % 8 + 1
    finally:
        await connection.close()


async def test_without_a_statement_cache(database: Database) -> None:
    connection: Connection = await asyncpg.connect(database.dsn, statement_cache_size=0)
    try:
        for number in range(20):
            assert await connection.fetchval("SELECT $1::int", number) == number
    finally:
        await connection.close()


async def test_types_of_the_database_are_looked_up(
    database: Database, connection: Connection
) -> None:
    # The look-up runs several statements and a `set_config` of asyncpg's own.
    row = await connection.fetchrow(
        "SELECT ROW(1, 'a')::city, ARRAY[ROW(2, 'b')::city]"
    )
    assert row is not None
    assert tuple(row[0]) == (1, "a")
    assert tuple(row[1][0]) == (2, "b")


async def test_nested_transactions(connection: Connection) -> None:
    outer = connection.transaction()
    await outer.start()
    await connection.execute("INSERT INTO city (name) VALUES ('a')")
    with pytest.raises(asyncpg.UniqueViolationError):
        async with connection.transaction():
            await connection.execute("INSERT INTO city (name) VALUES ('a')")
    assert await connection.fetchval("SELECT count(*) FROM city") == 1
    await outer.rollback()
    assert await connection.fetchval("SELECT count(*) FROM city") == 0


async def test_a_connection_recovers_from_errors(connection: Connection) -> None:
    for _ in range(5):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetchval("SELECT 1/$1::int", 0)
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await connection.fetchval("SELEC $1", 0)
        assert await connection.fetchval("SELECT 1/$1::int", 1) == 1


async def test_many_parameter_sets(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await connection.executemany(
        "INSERT INTO city (name) VALUES ($1)", [(f"m{n}",) for n in range(2000)]
    )
    assert await connection.fetchval("SELECT count(*) FROM city") == 2000
    await transaction.rollback()


async def test_a_failed_set_of_parameters_leaves_nothing(
    connection: Connection,
) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.executemany(
            "INSERT INTO city (name) VALUES ($1)", [("x",), ("y",), ("x",)]
        )
    assert await connection.fetchval("SELECT count(*) FROM city") == 0


async def test_copy_in_and_out(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await connection.copy_records_to_table(
        "city", records=[(n, f"r{n}") for n in range(5000)]
    )
    parts: list[bytes] = []

    async def keep(part: bytes) -> None:
        parts.append(part)

    await connection.copy_from_query(
        "SELECT * FROM city WHERE id < $1 ORDER BY id", 3000, output=keep
    )
    await transaction.rollback()
    assert b"".join(parts) == b"".join(b"%d\tr%d\n" % (n, n) for n in range(3000))


async def test_a_cursor_of_a_transaction(connection: Connection) -> None:
    async with connection.transaction():
        total = 0
        async for row in connection.cursor(
            "SELECT generate_series(1, $1::int)", 1000, prefetch=70
        ):
            total += row[0]
    assert total == 500_500


async def test_a_query_that_takes_too_long_is_cancelled(
    connection: Connection,
) -> None:
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(60)", timeout=0.2)
    assert await connection.fetchval("SELECT 1") == 1


async def test_a_task_that_is_cancelled_cancels_its_query(
    database: Database, connection: Connection
) -> None:
    query = "SELECT pg_sleep(62)"
    running = asyncio.create_task(connection.execute(query))
    other: Connection = await asyncpg.connect(database.direct_dsn)
    is_active = (
        "SELECT count(*) FROM pg_stat_activity WHERE query = $1"
        " AND state = 'active' AND datname = current_database()"
    )
    while not await other.fetchval(is_active, query):
        pass
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await connection.fetchval("SELECT 1") == 1
    while await other.fetchval(is_active, query):
        pass
    await other.close()


async def test_a_parameter_and_a_result_of_10_mb(connection: Connection) -> None:
    value = "0123456789" * 1_000_000
    assert await connection.fetchval("SELECT $1::text", value) == value


async def test_listeners_are_called(database: Database, connection: Connection) -> None:
    heard: asyncio.Queue[object] = asyncio.Queue()
    await connection.add_listener(
        "asyncpg", lambda _a, _b, _c, payload: heard.put_nowait(payload)
    )
    other: Connection = await asyncpg.connect(database.direct_dsn)
    await other.execute("SELECT pg_notify('asyncpg', 'hello')")
    await other.close()
    async with asyncio.timeout(2):
        assert await heard.get() == "hello"
    await connection.remove_listener("asyncpg", lambda *_: None)


async def test_a_connection_can_be_reset(connection: Connection) -> None:
    await connection.execute("SET work_mem = '7MB'")
    assert await connection.fetchval("SELECT $1::int", 1) == 1
    await connection.reset()
    assert await connection.fetchval("SHOW work_mem") != "7MB"
    assert await connection.fetchval("SELECT $1::int", 2) == 2


async def test_a_pool_of_twenty_runs_a_thousand_queries(database: Database) -> None:
    async with asyncpg.create_pool(database.dsn, min_size=20, max_size=20) as pool:

        async def ask(number: int) -> int:
            async with pool.acquire() as connection:
                value: int = await connection.fetchval("SELECT $1::int", number)
                return value

        answers = await asyncio.gather(*map(ask, range(1000)))
    assert answers == list(range(1000))


async def test_settings_of_the_start_up_packet(database: Database) -> None:
    connection: Connection = await asyncpg.connect(
        database.dsn,
        server_settings={"application_name": "asyncpg tests", "search_path": "x, y"},
    )
    try:
        for _ in range(2):
            assert await connection.fetchval("SHOW search_path") == "x, y"
            shown = await connection.fetchval("SHOW application_name")
            assert shown == "asyncpg tests"
    finally:
        await connection.close()


async def test_a_table_may_change_under_a_prepared_statement(
    connection: Connection,
) -> None:
    await connection.execute("DROP TABLE IF EXISTS shifting")
    await connection.execute("CREATE TABLE shifting AS SELECT 1 AS a")
    try:
        for number in range(3):
            row = await connection.fetchrow("SELECT * FROM shifting")
            assert row is not None and len(row) == number + 1
            await connection.execute(
                f"ALTER TABLE shifting ADD COLUMN b{number} int DEFAULT 2"
            )
    finally:
        await connection.execute("DROP TABLE shifting")


async def test_settings_of_the_start_up_packet_outlive_a_reset(
    database: Database,
) -> None:
    async with asyncpg.create_pool(
        database.dsn,
        min_size=1,
        max_size=1,
        server_settings={"search_path": "mine", "timezone": "Asia/Tokyo"},
    ) as pool:
        for _ in range(3):
            async with pool.acquire() as connection:  # ends with RESET ALL
                assert await connection.fetchval("SHOW search_path") == "mine"
                assert await connection.fetchval("SHOW timezone") == "Asia/Tokyo"
