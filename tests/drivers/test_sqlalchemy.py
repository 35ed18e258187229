"""SQLAlchemy over psycopg and psycopg2, its pool and its sessions."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Select,
    Table,
    Text,
    Uuid,
    create_engine,
    exc,
    insert,
    inspect,
    literal,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeEngine

from tests.drivers.conftest import Database


class Base(DeclarativeBase):
    pass


class City(Base):
    __tablename__ = "city"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


TYPES: tuple[TypeEngine[Any], ...] = (
    BigInteger(),
    Double(),
    Numeric(20, 4),
    Boolean(),
    Text(),
    LargeBinary(),
    Date(),
    DateTime(timezone=True),
    Uuid(),
    JSONB(),
    ARRAY(Integer()),
)


def typed(values: Sequence[object]) -> Select[Any]:
    """A query for values as parameters, one of each of TYPES."""
    columns = [
        literal(value, kind).cast(kind).label(f"c{number}")
        for number, (value, kind) in enumerate(zip(values, TYPES, strict=True))
    ]
    return select(*columns)


@pytest.fixture(params=["psycopg", "psycopg2"])
def engine(request: pytest.FixtureRequest, database: Database) -> Iterator[Engine]:
    url = database.dsn.replace("postgresql:", f"postgresql+{request.param}:")
    made = create_engine(url, pool_size=20, max_overflow=0)
    try:
        yield made
    finally:
        made.dispose()


def test_objects_are_stored_found_and_rolled_back(engine: Engine) -> None:
    with Session(engine) as session:
        session.add_all([City(name=f"s{n}") for n in range(300)])
        session.flush()
        found = session.scalars(select(City).where(City.name.like("s1%"))).all()
        assert len(found) == 111
        session.rollback()
        assert session.scalars(select(City)).all() == []


def test_a_session_recovers_from_an_error(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(City(name="a"))
        session.flush()
        with pytest.raises(exc.IntegrityError), session.begin_nested():
            session.execute(insert(City).values(name="a"))
        assert session.scalars(select(City.name)).all() == ["a"]
        session.rollback()


def test_connections_are_used_again(engine: Engine) -> None:
    for number in range(30):
        with engine.connect() as connection:
            row = connection.execute(text("SELECT :n + 1"), {"n": number})
            assert row.scalar() == number + 1


def test_rows_are_streamed(engine: Engine) -> None:
    with engine.connect() as connection:
        rows = connection.execution_options(stream_results=True).execute(
            text("SELECT generate_series(1, 5000)")
        )
        assert sum(rows.scalars()) == 12_502_500


def test_tables_are_inspected(engine: Engine) -> None:
    columns = inspect(engine).get_columns("city")
    assert [column["name"] for column in columns] == ["id", "name"]


def test_values_come_back_as_they_went(engine: Engine) -> None:
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
    with engine.connect() as connection:
        assert tuple(connection.execute(typed(values)).one()) == values


def test_a_table_is_made_filled_and_dropped(engine: Engine) -> None:
    made = Table("made", MetaData(), Column("id", Integer, primary_key=True))
    with engine.connect() as connection:
        made.create(connection)
        many = [{"id": number} for number in range(2000)]
        connection.execute(insert(made), many)
        assert len(connection.execute(select(made)).all()) == 2000
        found = connection.execute(insert(made).returning(made.c.id), [{"id": 5000}])
        assert found.scalars().all() == [5000]
        made.drop(connection)
        connection.commit()


def test_10_mb_there_and_back(engine: Engine) -> None:
    value = "0123456789" * 1_000_000
    with engine.connect() as connection:
        query = text("SELECT CAST(:v AS text)")
        assert connection.execute(query, {"v": value}).scalar() == value


def test_an_isolation_level(engine: Engine) -> None:
    with engine.connect().execution_options(
        isolation_level="SERIALIZABLE"
    ) as connection:
        shown = connection.execute(text("SHOW transaction_isolation")).scalar()
        assert shown == "serializable"


def test_a_pool_of_20_runs_1000_queries(engine: Engine) -> None:
    def ask(number: int) -> object:
        with engine.connect() as connection:
            query = text("SELECT CAST(:n AS int)")
            return connection.execute(query, {"n": number}).scalar()

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(ask, range(1000))) == list(range(1000))
