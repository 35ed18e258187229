"""SQLAlchemy over psycopg, its pool and its sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, exc, insert, inspect, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.drivers.conftest import Database


class Base(DeclarativeBase):
    pass


class City(Base):
    __tablename__ = "city"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


@pytest.fixture(params=["psycopg", "psycopg2"])
def engine(request: pytest.FixtureRequest, database: Database) -> Iterator[Engine]:
    url = database.dsn.replace("postgresql:", f"postgresql+{request.param}:")
    made = create_engine(url)
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
