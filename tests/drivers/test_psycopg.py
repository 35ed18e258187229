"""psycopg 3, in all that it can do."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import scalar_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

from tests.drivers.conftest import Database

VALUES: tuple[tuple[str, object], ...] = (
    ("int2", 7),
    ("int4", -(2**31)),
    ("int8", 2**62),
    ("float8", 1.5e300),
    ("numeric", Decimal("123456789.000000001")),
    ("bool", True),
    ("text", "ögel 🐘"),
    ("bytea", bytes(range(256))),
    ("date", datetime.date(2026, 2, 28)),
    ("timestamptz", datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)),
    ("interval", datetime.timedelta(days=3, seconds=4, microseconds=5)),
    ("uuid", UUID(int=2**127 + 5)),
    ("int4[]", [1, None, 3]),
    ("text[]", ["a", 'b"c', "{}"]),
    ("text", None),
)


@pytest.fixture
def connection(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("is_binary", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize(("kind", "value"), VALUES)
def test_a_value_comes_back_as_it_went(
    connection: psycopg.Connection[Any], kind: str, value: object, is_binary: bool
) -> None:
    query = f"SELECT {'%b' if is_binary else '%s'}::{kind}"
    with connection.cursor(binary=is_binary) as cursor:
        assert cursor.execute(query, [value]).fetchone() == (value,)


def test_json_comes_back_as_it_went(connection: psycopg.Connection[Any]) -> None:
    tree = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    assert connection.execute("SELECT %s", [Jsonb(tree)]).fetchone() == (tree,)


def test_a_prepared_statement_is_run_again(
    connection: psycopg.Connection[Any],
) -> None:
    for number in range(20):
        row = connection.execute(
            "SELECT %s::int + 1", [number], prepare=True
        ).fetchone()
        assert row == (number + 1,)


def test_more_statements_than_a_driver_keeps(
    connection: psycopg.Connection[Any],
) -> None:
    connection.prepared_max = 5
    for number in range(60):
        row = connection.execute(
            f"SELECT %s::int + {number % 12}", [number], prepare=True
        ).fetchone()
        assert row == (number + number % 12,)


def test_a_transaction_with_savepoints(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("INSERT INTO city (name) VALUES ('one')")
        with pytest.raises(errors.UniqueViolation), connection.transaction():
            connection.execute("INSERT INTO city (name) VALUES ('two'), ('one')")
        with connection.transaction():
            connection.execute("INSERT INTO city (name) VALUES ('three')")
        rows = connection.execute("SELECT name FROM city ORDER BY id").fetchall()
        assert rows == [("one",), ("three",)]
    assert connection.execute("SELECT count(*) FROM city").fetchone() == (0,)


def test_a_failed_transaction_refuses_until_it_ends(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute("BEGIN")
    with pytest.raises(errors.DivisionByZero):
        connection.execute("SELECT 1/0")
    with pytest.raises(errors.InFailedSqlTransaction):
        connection.execute("SELECT 1")
    connection.execute("ROLLBACK")
    assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_connection_recovers_from_errors(
    connection: psycopg.Connection[Any], prepare: bool
) -> None:
    for _ in range(10):
        with pytest.raises(errors.DivisionByZero) as caught:
            connection.execute("SELECT 1/%s::int", [0], prepare=prepare)
        assert caught.value.diag.message_primary == "division by zero"
        assert connection.execute(
            "SELECT 1/%s::int", [1], prepare=prepare
        ).fetchone() == (1,)


def test_a_pipeline_answers_in_order(connection: psycopg.Connection[Any]) -> None:
    with connection.pipeline():
        cursors = [
            connection.execute("SELECT %s::int", [number]) for number in range(300)
        ]
        assert [each.fetchone() for each in cursors] == [(n,) for n in range(300)]


def test_a_pipeline_of_prepared_statements(
    connection: psycopg.Connection[Any],
) -> None:
    for _ in range(3):
        with connection.pipeline():
            cursors = [
                connection.execute(f"SELECT %s::int * {n % 7}", [n], prepare=True)
                for n in range(100)
            ]
            assert [each.fetchone() for each in cursors] == [
                (n * (n % 7),) for n in range(100)
            ]


@pytest.mark.parametrize("prepare", [False, True])
def test_an_error_inside_a_pipeline_fails_the_rest_of_it(
    connection: psycopg.Connection[Any], prepare: bool
) -> None:
    for _ in range(3):
        with pytest.raises(errors.DivisionByZero), connection.pipeline():
            connection.execute("SELECT %s::int", [1], prepare=prepare)
            connection.execute("SELECT 1/%s::int", [0], prepare=prepare)
            connection.execute("SELECT %s::int + 2", [1], prepare=prepare)
        row = connection.execute("SELECT %s::int + 2", [1], prepare=prepare).fetchone()
        assert row == (3,)


def test_a_pipeline_goes_on_behind_a_sync(
    connection: psycopg.Connection[Any],
) -> None:
    with connection.pipeline() as pipeline:
        bad = connection.execute("SELECT 1/%s::int", [0], prepare=True)
        with pytest.raises(errors.DivisionByZero):
            pipeline.sync()
            bad.fetchone()
        good = connection.execute("SELECT %s::int", [5], prepare=True)
        assert good.fetchone() == (5,)


def test_many_parameter_sets(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO city (name) VALUES (%s)", [[f"c{n}"] for n in range(500)]
        )
        assert cursor.rowcount == 500


def test_copy_in_and_out(connection: psycopg.Connection[Any]) -> None:
    rows = [(n, f"name\t{n}\n\\") for n in range(3000)]
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        with cursor.copy("COPY city FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        with cursor.copy("COPY (SELECT * FROM city ORDER BY id) TO STDOUT") as copy:
            copy.set_types(["int4", "text"])
            assert list(copy.rows()) == rows


def test_copy_in_binary_with_parameters(connection: psycopg.Connection[Any]) -> None:
    with (
        connection.cursor() as cursor,
        cursor.copy(
            "COPY (SELECT generate_series(1, %s)) TO STDOUT (FORMAT binary)", [50]
        ) as copy,
    ):
        copy.set_types(["int4"])
        assert list(copy.rows()) == [(n,) for n in range(1, 51)]


def test_a_copy_that_the_client_breaks_off(
    connection: psycopg.Connection[Any],
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        connection.cursor() as cursor,
        cursor.copy("COPY city FROM STDIN") as copy,
    ):
        copy.write_row((1, "a"))
        raise ZeroDivisionError
    assert connection.execute("SELECT count(*) FROM city").fetchone() == (0,)


def test_a_copy_that_the_server_refuses(connection: psycopg.Connection[Any]) -> None:
    with (
        pytest.raises(errors.InvalidTextRepresentation),
        connection.cursor() as cursor,
        cursor.copy("COPY city FROM STDIN") as copy,
    ):
        copy.write(b"x\ta\n")
    assert connection.execute("SELECT count(*) FROM city").fetchone() == (0,)


def test_a_query_is_cancelled(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    def cancel_once_it_runs() -> None:
        with psycopg.connect(database.direct_dsn, autocommit=True) as other:
            while not other.execute(
                "SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
                " AND state = 'active' AND datname = current_database()"
            ).rowcount:
                pass
        connection.cancel_safe(timeout=10)

    with ThreadPoolExecutor(1) as pool:
        canceller = pool.submit(cancel_once_it_runs)
        with pytest.raises(errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")
        canceller.result()
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_parameter_and_a_result_of_10_mb(connection: psycopg.Connection[Any]) -> None:
    value = "0123456789" * 1_000_000
    row = connection.execute("SELECT %s::text, length(%s::text)", [value, value])
    assert row.fetchone() == (value, len(value))


def test_a_prepared_statement_with_a_parameter_of_10_mb(
    connection: psycopg.Connection[Any],
) -> None:
    value = bytes(range(256)) * 40_000
    for _ in range(2):
        row = connection.execute("SELECT length(%b::bytea)", [value], prepare=True)
        assert row.fetchone() == (len(value),)


@pytest.mark.parametrize("parameters", [None, ["x"]], ids=["simple", "extended"])
def test_a_text_of_3_mb(
    connection: psycopg.Connection[Any], parameters: list[str] | None
) -> None:
    text = "y" * 3_000_000
    query = f"SELECT length('{text}')" + (", %s::text" if parameters else "")
    row = connection.execute(query, parameters).fetchone()
    assert row is not None and row[0] == len(text)


def test_rows_of_1_mb(connection: psycopg.Connection[Any]) -> None:
    with connection.cursor(row_factory=scalar_row) as cursor:
        cursor.execute("SELECT repeat(n::text, 1000000) FROM generate_series(1, 8) n")
        for number, value in enumerate(cursor, 1):
            assert value == str(number) * 1_000_000


def test_a_server_side_cursor(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(), connection.cursor("walk") as cursor:
        cursor.itersize = 100
        cursor.execute("SELECT generate_series(1, %s)", [1000])
        assert [row[0] for row in cursor] == list(range(1, 1001))


def test_a_cursor_with_hold_outlives_its_transaction(
    connection: psycopg.Connection[Any],
) -> None:
    with connection.cursor("kept", withhold=True) as cursor:
        cursor.execute("SELECT generate_series(1, 10)")
        assert len(cursor.fetchmany(4)) == 4
        assert len(cursor.fetchall()) == 6


def test_rows_are_streamed_one_by_one(connection: psycopg.Connection[Any]) -> None:
    with connection.cursor() as cursor:
        rows = cursor.stream("SELECT generate_series(1, %s)", [2000])
        assert sum(row[0] for row in rows) == 2_001_000


def test_notices_arrive(connection: psycopg.Connection[Any]) -> None:
    heard: list[str | None] = []
    connection.add_notice_handler(lambda diag: heard.append(diag.message_primary))
    connection.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$")
    assert heard == ["one", "two"]


def test_notifications_arrive(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("LISTEN drivers")
    with psycopg.connect(database.direct_dsn, autocommit=True) as other:
        other.execute("SELECT pg_notify('drivers', 'hello')")
    heard = next(connection.notifies(timeout=2), None)
    assert heard is not None
    assert (heard.channel, heard.payload) == ("drivers", "hello")


def test_settings_last_for_the_connection(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute("SET work_mem = '5MB'")
    assert connection.execute("SHOW work_mem").fetchone() == ("5MB",)


def test_settings_of_one_transaction(connection: psycopg.Connection[Any]) -> None:
    before = connection.execute("SHOW work_mem").fetchone()
    with connection.transaction():
        connection.execute("SET LOCAL work_mem = '5MB'")
        assert connection.execute("SHOW work_mem").fetchone() == ("5MB",)
    assert connection.execute("SHOW work_mem").fetchone() == before


def test_temporary_tables_last_for_the_connection(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute("CREATE TEMP TABLE mine AS SELECT 1 AS a")
    assert connection.execute("SELECT a FROM mine").fetchone() == (1,)


def test_statements_prepared_in_sql_last(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute("PREPARE mine AS SELECT 1")
    assert connection.execute("EXECUTE mine").fetchone() == (1,)


def test_advisory_locks_last_for_the_connection(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("SELECT pg_advisory_lock(77)")
    with psycopg.connect(database.direct_dsn, autocommit=True) as other:
        row = other.execute("SELECT pg_try_advisory_xact_lock(77)").fetchone()
    assert row == (False,)


@pytest.mark.parametrize(
    ("options", "shown", "value"),
    [
        ({"application_name": "it's \\ mine"}, "application_name", "it's \\ mine"),
        ({"options": "-c search_path=a,b"}, "search_path", "a,b"),
        ({"options": "-c work_mem=3MB -c enable_seqscan=off"}, "enable_seqscan", "off"),
        ({"client_encoding": "latin1"}, "client_encoding", "LATIN1"),
        ({"options": r"-c my.value=a\ b\\c"}, "my.value", r"a b\c"),
    ],
)
def test_settings_of_the_start_up_packet(
    database: Database, options: dict[str, str], shown: str, value: str
) -> None:
    with psycopg.connect(database.dsn, autocommit=True, **options) as connection:  # type: ignore[arg-type]
        for _ in range(3):
            row = connection.execute(f"SHOW {shown}").fetchone()
            assert row == (value,)


def test_a_wrong_setting_in_the_start_up_packet(database: Database) -> None:
    with pytest.raises(psycopg.OperationalError, match="nonsense"):
        psycopg.connect(database.dsn, options="-c work_mem=nonsense")


def test_a_pool_of_20_runs_1000_queries(database: Database) -> None:
    with ConnectionPool(database.dsn, min_size=20, max_size=20) as pool:

        def ask(number: int) -> object:
            with pool.connection() as connection:
                row = connection.execute("SELECT %s::int", [number]).fetchone()
                assert row is not None
                return row[0]

        with ThreadPoolExecutor(30) as threads:
            assert list(threads.map(ask, range(1000))) == list(range(1000))


@pytest.mark.parametrize("command", ["RESET ALL", "RESET search_path", "DISCARD ALL"])
def test_a_reset_goes_back_to_the_settings_of_the_start_up_packet(
    database: Database, command: LiteralString
) -> None:
    with psycopg.connect(
        database.dsn, autocommit=True, options="-c search_path=mine"
    ) as connection:
        connection.execute("SET search_path = other")
        connection.execute(command)
        assert connection.execute("SHOW search_path").fetchone() == ("mine",)
        connection.execute("BEGIN; SET search_path = other")
        connection.execute("ROLLBACK")
        assert connection.execute("SHOW search_path").fetchone() == ("mine",)
