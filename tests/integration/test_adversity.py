"""What a review of the data plane found: waits over TLS, leaving, misleading SQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import psycopg
import pytest

from ogelproxy.config import Secret
from ogelproxy.tenants.model import LimiterMode
from ogelproxy.tenants.store import Store
from tests.fixtures.certificates import Authority
from tests.fixtures.engine import ACTOR, Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    SYNC,
    TERMINATE,
    Wire,
    bind,
    execute,
    kinds,
    parse,
    query,
)


@pytest.fixture(scope="module")
def narrow(
    postgres: Postgres,
    tmp_path_factory: pytest.TempPathFactory,
    authority: Authority,
) -> Iterator[Proxy]:
    """A proxy with TLS and two servers for each database."""
    issued = authority.issue("localhost")
    settings = {
        "OGELPROXY_TLS_CERT": str(issued.cert),
        "OGELPROXY_TLS_KEY": str(issued.key),
        "OGELPROXY_POOL_MAX_SERVERS": "2",
        "OGELPROXY_POOL_QUEUE_TIMEOUT": "5",
    }
    proxy = Proxy(postgres, tmp_path_factory.mktemp("narrow"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def member(narrow: Proxy) -> Organization:
    return narrow.create_organization(limiter=LimiterMode.OFF)


@pytest.mark.parametrize("size", [1_000, 20_000, 100_000, 900_000])
def test_a_query_of_many_tls_records_is_answered(
    member: Organization, size: int
) -> None:
    with member.connect("transaction", sslmode="require") as connection:
        row = connection.execute(f"SELECT length('{'x' * size}')").fetchone()
    assert row == (size,)


def test_a_query_over_tls_waits_for_its_token(narrow: Proxy) -> None:
    throttled = narrow.create_organization(tier="free", max_wait=5.0)
    with throttled.connect("transaction", sslmode="require") as connection:
        for number in range(15):
            row = connection.execute(f"SELECT {number}").fetchone()
            assert row == (number,)


def test_what_clients_ask_for_before_their_goodbyes_is_done(
    member: Organization,
) -> None:
    with psycopg.connect(member.direct_dsn, autocommit=True) as direct:
        direct.execute("CREATE TABLE last_words (id int)")
        clients = [Wire(member.dsn("transaction")) for _ in range(40)]
        for number, client in enumerate(clients):
            client.send(query(f"INSERT INTO last_words VALUES ({number})") + TERMINATE)
        for client in clients:
            assert kinds(client.rest()) == "CZ"
        rows = direct.execute("SELECT id FROM last_words ORDER BY id").fetchall()
        assert rows == [(number,) for number in range(40)]


def test_goodbyes_inside_of_a_batch_cost_no_server(member: Organization) -> None:
    for _ in range(3):
        wire = Wire(member.dsn("transaction"))
        wire.send(parse("SELECT 1") + bind() + execute() + TERMINATE)
        wire.sock.close()
    wire = Wire(member.dsn("transaction"))
    assert kinds(wire.ask(query("SELECT 2"))) == "TDCZ"
    wire.sock.close()


def test_a_parse_that_fails_makes_no_statement_free(narrow: Proxy) -> None:
    free = narrow.create_organization(tier="free")
    wire = Wire(free.dsn("session"))
    wire.ask(parse("SELECT 42", "a"), SYNC)
    wire.ask(parse("ROLLBACK", "a"), SYNC)
    answers = [kinds(wire.ask(bind(name="a"), execute(), SYNC)) for _ in range(60)]
    assert any("E" in answer for answer in answers)
    wire.sock.close()


@pytest.mark.parametrize("database", ["session", "transaction"])
def test_a_bind_that_fails_makes_no_portal_free(narrow: Proxy, database: str) -> None:
    free = narrow.create_organization(tier="free")
    wire = Wire(free.dsn(database))
    wire.ask(query("BEGIN"))
    wire.ask(parse("SELECT 42 FROM generate_series(1, 999)"), bind(portal="x"), SYNC)
    wire.ask(query("SAVEPOINT s"))
    wire.ask(parse("ROLLBACK"), bind(portal="x"), SYNC)
    wire.ask(query("ROLLBACK TO s"))
    start = time.monotonic()
    for _ in range(40):
        wire.ask(execute("x", 1), SYNC)
    assert time.monotonic() - start > 1.5  # in a transaction they wait: 10 a second
    wire.sock.close()


def test_an_unnamed_statement_outlives_another_clients_query(
    member: Organization,
) -> None:
    one, other = Wire(member.dsn("transaction")), Wire(member.dsn("transaction"))
    one.ask(parse("SELECT 7"), SYNC)
    other.ask(query("SELECT 8"))
    assert kinds(one.ask(bind(), execute(), SYNC)) == "2DCZ"
    one.sock.close()
    other.sock.close()


def test_a_setting_behind_very_many_portals_stays_with_its_transaction(
    member: Organization,
) -> None:
    one, other = Wire(member.dsn("transaction")), Wire(member.dsn("transaction"))
    one.ask(query("BEGIN"))
    portals = [bind(portal=f"p{number}") for number in range(1000)]
    one.ask(parse("SELECT 1"), *portals, SYNC)
    one.ask(parse("SET search_path = another"), bind(portal="x"), execute("x"), SYNC)
    one.ask(query("COMMIT"))
    shown = other.ask(query("SHOW search_path"))
    assert b"another" not in shown[1].body
    one.sock.close()
    other.sock.close()


@pytest.mark.parametrize(
    "setting",
    [
        "client_encoding=SJIS",
        "client_encoding=gbk",
        "standard_conforming_strings=off",
    ],
)
def test_sessions_whose_strings_end_elsewhere_are_refused(
    member: Organization, setting: str
) -> None:
    name, value = setting.split("=")
    with pytest.raises(psycopg.Error, match="is not supported"):
        member.connect("transaction", options=f"-c {setting}")
    with (
        member.connect("transaction") as connection,
        pytest.raises(psycopg.Error, match="is not supported"),
    ):
        connection.execute(f"SET {name} = '{value}'")


def test_clients_of_a_database_that_moved_are_asked_to_come_again(
    member: Organization, narrow: Proxy
) -> None:
    elsewhere = narrow.postgres.create_database()
    with member.connect("transaction") as connection:
        connection.execute("SELECT 1")
        narrow.operate(
            partial(
                Store.set_dsn,
                handle=member.handle,
                name="transaction",
                dsn=Secret(narrow.postgres.dsn(elsewhere)),
                actor=ACTOR,
            )
        )

        def ended() -> bool:
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError as error:
                return error.sqlstate in ("57P01", None)
            return False

        eventually(ended)
    with member.connect("transaction") as connection:
        row = connection.execute("SELECT current_database()").fetchone()
    assert row == (elsewhere,)
