"""`SHOW o7s.…`: what a tenant asks about itself, on any path and in every mode."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.rows import dict_row

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import MODES, Organization, Proxy
from tests.fixtures.wire import (
    FLUSH,
    SYNC,
    Wire,
    bind,
    close_statement,
    describe_portal,
    describe_statement,
    execute,
    kinds,
    parse,
    query,
)

WHOAMI = "SHOW o7s.whoami"
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def show(connection: psycopg.Connection, view: str, **options: Any) -> dict[str, Any]:
    """The one row of a view, by its columns."""
    rows = show_all(connection, view, **options)
    assert len(rows) == 1
    return rows[0]


def show_all(
    connection: psycopg.Connection, view: str, **options: Any
) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row, binary=False) as cursor:
        return cursor.execute(f"SHOW o7s.{view}", **options).fetchall()  # type: ignore[arg-type]


@modes
def test_whoami_tells_who_asks(organization: Organization, mode: PoolMode) -> None:
    with organization.connect(str(mode), application_name="reports") as connection:
        row = show(connection, "whoami")
        assert row["organisation"] == organization.handle
        assert row["tier"] == "enterprise"
        assert row["key_id"] == str(organization.key_id)
        assert row["key_name"] == "first"
        assert row["database"] == row["pool_mode"] == str(mode)
        assert row["database_type"] == "postgres"
        assert row["connection_id"] == connection.info.backend_pid
        assert row["address"] == "127.0.0.1"
        assert row["tls"] is None
        assert row["protocol"] in ("3.0", "3.2")
        assert row["application_name"] == "reports"


@modes
@pytest.mark.parametrize("prepare", [False, True])
def test_psycopg_shows_a_view_in_each_protocol(
    organization: Organization, mode: PoolMode, prepare: bool
) -> None:
    with organization.connect(str(mode)) as connection:
        for _ in range(3):
            row = show(connection, "limits", prepare=prepare)
            assert (row["tier"], row["mode"]) == ("enterprise", "off")
            assert row["connections"] >= 1
        with connection.cursor(binary=True) as cursor:
            cursor.execute("SHOW o7s.limits", prepare=prepare)
            assert cursor.fetchone()[2:4] == (1000.0, 5000.0)  # type: ignore[index]


@modes
async def test_asyncpg_shows_a_view_in_binary(
    organization: Organization, mode: PoolMode
) -> None:
    connection = await asyncpg.connect(organization.dsn(str(mode)))
    try:
        for _ in range(2):  # the second time from its cache of statements
            row = await connection.fetchrow(WHOAMI)
            assert row is not None
            assert row["organisation"] == organization.handle
            assert row["connected_at"].tzinfo is not None
            assert await connection.fetchval("SELECT 1") == 1
        async with connection.transaction():
            assert await connection.fetchval("SELECT 2") == 2
            assert await connection.fetchval(WHOAMI) == organization.handle
            cursor = await connection.cursor("SHOW o7s.help")
            assert [len(await cursor.fetch(2)), len(await cursor.fetch(9))] == [2, 4]
    finally:
        await connection.close()


def test_psql_shows_a_view(organization: Organization) -> None:
    done = subprocess.run(
        ["psql", organization.dsn(), "-XAtc", "show O7S.whoami ; -- it is me"],
        capture_output=True,
        text=True,
        env={**os.environ, "PGCONNECT_TIMEOUT": "5"},
        check=True,
    )
    assert done.stdout.startswith(f"{organization.handle}|")


def test_limits_tell_the_tokens_that_are_left(proxy: Proxy) -> None:
    tenant = proxy.create_organization(tier="free")
    with tenant.connect() as connection:
        for _ in range(4):
            connection.execute("SELECT 1")
        row = show(connection, "limits")
        assert (row["queries_per_second"], row["burst"]) == (10.0, 10.0)
        assert 5.9 < row["tokens"] < 10.0
        assert row["admitted"] == 4
        assert (row["connections"], row["max_connections"]) == (1, 5)


def test_a_view_costs_no_token_and_is_no_usage(proxy: Proxy) -> None:
    tenant = proxy.create_organization(tier="free")
    with tenant.connect() as connection:
        for _ in range(40):
            show_all(connection, "help")
        assert show_all(connection, "usage") == []
        assert show(connection, "limits")["admitted"] == 0


def test_a_view_needs_no_server(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_POOL_MAX_SERVERS"] = "1"
    own_proxy.start()
    tenant = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with tenant.connect("transaction") as one, tenant.connect("transaction") as other:
        with one.transaction():
            one.execute("SELECT 1")  # holds the only server
            assert show(other, "whoami")["organisation"] == tenant.handle
            assert show(other, "whoami", prepare=True)["database"] == "transaction"


def test_usage_and_slow_are_of_the_asking_organisation_only(proxy: Proxy) -> None:
    one, other = (proxy.create_organization(limiter=LimiterMode.OFF) for _ in range(2))
    with one.connect("auto") as mine, other.connect("auto") as theirs:
        for _ in range(3):
            mine.execute("SELECT pg_sleep(0.02)")
        with pytest.raises(psycopg.errors.DivisionByZero):
            mine.execute("SELECT 1 / 0")
        theirs.execute("SELECT generate_series(1, 10)")
        usage = show(mine, "usage")
        assert usage["database"] == "auto"
        assert (usage["queries"], usage["errors"], usage["rows"]) == (4, 1, 3)
        slowest, failing = show_all(mine, "slow")
        assert (slowest["queries"], slowest["errors"]) == (3, 0)
        assert 0.02 <= slowest["mean_seconds"] <= slowest["longest_seconds"]
        assert (failing["errors"], failing["sqlstate"]) == (1, "22012")
        assert show(theirs, "usage")["rows"] == 10
        assert len(show_all(theirs, "slow")) == 1


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_usage_goes_on_when_its_batch_is_closed(proxy: Proxy) -> None:
    tenant = proxy.create_organization(limiter=LimiterMode.OFF)
    with tenant.connect("auto") as connection:
        connection.execute("SELECT 1")

        def is_delivered() -> bool:
            with psycopg.connect(proxy.postgres.dsn(proxy.control)) as control:
                found = control.execute(
                    "SELECT 1 FROM platform.usage_history WHERE handle = %s",
                    [tenant.handle],
                )
                return found.fetchone() is not None

        until(is_delivered)
        connection.execute("SELECT 1")
        for view in ("usage", "slow"):
            until(lambda view=view: show(connection, view)["queries"] == 2)  # type: ignore[misc]


@pytest.fixture
def wire(organization: Organization) -> Any:
    with Wire(organization.dsn("transaction")) as wire:
        yield wire


def test_the_extended_protocol_is_answered_message_by_message(wire: Wire) -> None:
    got = wire.ask(
        parse("SHOW o7s.help", "v"),
        describe_statement("v"),
        bind(name="v"),
        describe_portal(),
        execute(max_rows=2),
        execute(),
        close_statement("v"),
        SYNC,
    )
    assert kinds(got) == "1tT2TDDsDDDDC3Z"
    assert got[-1].body == b"I"


def test_a_view_is_answered_in_its_turn_in_a_batch(wire: Wire) -> None:
    real = parse("SELECT 1"), bind(), execute()
    view = parse(WHOAMI), bind(), execute()
    assert kinds(wire.ask(*real, *view, *real, SYNC)) == "12DC12DC12DCZ"
    assert kinds(wire.ask(*view, *real, *view, SYNC)) == "12DC12DC12DCZ"
    named = parse("SELECT 1", "n"), bind(name="n"), execute(), close_statement("n")
    assert kinds(wire.ask(*named, *view, *named, *view, SYNC)) == "12DC312DC12DC312DCZ"


def test_a_view_waits_for_the_answers_before_it(wire: Wire) -> None:
    slow = query("SELECT pg_sleep(0.1)")
    wire.send(slow + query(WHOAMI) + slow + parse(WHOAMI) + bind() + execute() + SYNC)
    assert kinds(wire.until("ZZZZ")) == "TDCZTDCZTDCZ12DCZ"


def test_a_view_behind_a_failed_message_is_skipped(wire: Wire) -> None:
    got = wire.ask(parse("SELEC"), parse(WHOAMI, "v"), bind(name="v"), execute(), SYNC)
    assert kinds(got) == "EZ"
    got = wire.ask(parse(WHOAMI), bind([b"1"]), execute(), SYNC)
    assert kinds(got) == "1EZ"
    assert got[1].fields()["C"] == "08P01"
    assert kinds(wire.ask(query("SELECT 1"))) == "TDCZ"


def test_a_view_in_a_transaction_keeps_its_state(wire: Wire) -> None:
    view = parse(WHOAMI), bind(), execute(), SYNC
    wire.ask(query("BEGIN"))
    assert [wire.ask(*view)[-1].body, wire.ask(query(WHOAMI))[-1].body] == [b"T"] * 2
    wire.ask(query("SELEC"))
    for messages in (view, (query(WHOAMI),)):
        got = wire.ask(*messages)
        assert got[0].fields()["C"] == "25P02"
        assert got[-1].body == b"E"
    assert wire.ask(query("ROLLBACK"))[-1].body == b"I"
    assert kinds(wire.ask(query(WHOAMI))) == "TDCZ"


def test_a_name_of_a_view_may_mean_something_else_later(wire: Wire) -> None:
    wire.ask(parse(WHOAMI), bind(), execute(), SYNC)
    got = wire.ask(parse("SELECT 7"), bind(), execute(), SYNC)
    assert got[2].body.endswith(b"7")
    wire.ask(parse(WHOAMI, "v"), SYNC)
    wire.ask(close_statement("v"), SYNC)
    got = wire.ask(parse("SELECT 8", "v"), bind(name="v"), execute(), SYNC)
    assert got[2].body.endswith(b"8")


def test_a_flushed_view_is_answered_before_its_sync(wire: Wire) -> None:
    wire.send(parse(WHOAMI) + bind() + execute() + FLUSH)
    assert kinds(wire.until("C")) == "12DC"
    assert kinds(wire.ask(SYNC)) == "Z"


@pytest.mark.parametrize(
    "text",
    [
        "SHOW o7s.nothing",
        "SHOW o7s.whoami; SELECT 1",
        "SHOW o7s.whoami x",
        "SHOW o7s." + "/* */ " * 1000,
    ],
)
def test_what_is_no_view_is_left_to_postgres(
    organization: Organization, text: str
) -> None:
    with organization.connect("auto") as connection:
        with pytest.raises(
            (psycopg.errors.UndefinedObject, psycopg.errors.SyntaxError)
        ):
            connection.execute(text)
        assert show(connection, "whoami")


def test_pins_tell_which_connections_keep_their_server_and_why(proxy: Proxy) -> None:
    one, other = (proxy.create_organization(limiter=LimiterMode.OFF) for _ in range(2))
    with (
        one.connect("auto", application_name="jobs") as pinned,
        one.connect("auto") as free,
        other.connect("auto") as stranger,
    ):
        pinned.execute("CREATE TEMPORARY TABLE kept (n int)")
        until(lambda: len(show_all(free, "pins")) == 1)
        row = show(free, "pins")
        assert row["connection_id"] == pinned.info.backend_pid
        assert (row["database"], row["application_name"]) == ("auto", "jobs")
        assert row["reasons"] == "temporary objects"
        assert row["since"].tzinfo is not None
        assert show_all(stranger, "pins") == []
        pinned.execute("DROP TABLE kept")
        until(lambda: show_all(free, "pins") == [])


def test_every_view_is_listed_and_shown(organization: Organization) -> None:
    with organization.connect("auto") as connection:
        for row in show_all(connection, "help"):
            connection.execute(row["statement"]).fetchall()


def test_an_unfinished_message_about_a_view_is_waited_for(
    organization: Organization,
) -> None:
    with Wire(organization.dsn("auto")) as wire:
        message = query(WHOAMI)
        for each in range(len(message)):
            wire.send(message[each : each + 1])
        assert kinds(wire.until("Z")) == "TDCZ"
