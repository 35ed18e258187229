"""SQLAlchemy on asyncio, over asyncpg and psycopg."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from decimal import Decimal
from uuid import UUID

import pytest
from sqlalchemy import exc, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tests.drivers.conftest import Database
from tests.drivers.test_sqlalchemy import City, typed


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(
    request: pytest.FixtureRequest, database: Database
) -> AsyncIterator[AsyncEngine]:
    url = database.dsn.replace("postgresql:", f"postgresql+{request.param}:")
    made = create_async_engine(url, pool_size=20, max_overflow=0)
    try:
        yield made
    finally:
        await made.dispose()


async def test_values_come_back_as_they_went(engine: AsyncEngine) -> None:
    values = (
        2**62,
        1.5,
        Decimal("12345.0678"),
        True,
        "ögel 🐘",
        bytes(range(256)),
        datetime.date(2026, 2, 28),
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
        UUID(int=5),
        {"a": [1, "ü", None]},
        [1, 2],
    )
    async with engine.connect() as connection:
        row = (await connection.execute(typed(values))).one()
        assert tuple(row) == values


async def test_objects_are_stored_found_and_rolled_back(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add_all([City(name=f"s{n}") for n in range(300)])
        await session.flush()
        found = await session.scalars(select(City).where(City.name.like("s1%")))
        assert len(found.all()) == 111
        await session.rollback()
        assert (await session.scalars(select(City))).all() == []


async def test_a_savepoint_takes_back_an_error(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add(City(name="a"))
        await session.flush()
        with pytest.raises(exc.IntegrityError):
            async with session.begin_nested():
                await session.execute(insert(City).values(name="a"))
        assert (await session.scalars(select(City.name))).all() == ["a"]
        await session.rollback()


async def test_a_connection_recovers_from_errors(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        for _ in range(5):
            with pytest.raises(exc.DBAPIError):
                await connection.execute(text("SELECT 1 / (:n - 1)"), {"n": 1})
            await connection.rollback()
            assert await connection.scalar(text("SELECT 1 / :n"), {"n": 1}) == 1


async def test_rows_are_streamed(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        rows = await connection.stream(text("SELECT generate_series(1, 5000)"))
        assert sum([value async for value in rows.scalars()]) == 12_502_500


async def test_a_task_that_is_cancelled_ends_its_query(engine: AsyncEngine) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(60)"))
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_10_mb_there_and_back(engine: AsyncEngine) -> None:
    value = "0123456789" * 1_000_000
    async with engine.connect() as connection:
        assert (
            await connection.scalar(text("SELECT CAST(:v AS text)"), {"v": value})
            == value
        )


async def test_a_pool_of_20_runs_1000_queries(engine: AsyncEngine) -> None:
    async def ask(number: int) -> object:
        async with engine.connect() as connection:
            return await connection.scalar(
                text("SELECT CAST(:n AS int)"), {"n": number}
            )

    answers = await asyncio.gather(*map(ask, range(1000)))
    assert answers == list(range(1000))
