"""Usage is exact: once per query, through errors, kills and outages."""

from __future__ import annotations

import random
import time

import psycopg
import pytest
from psycopg import sql

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Proxy
from tests.fixtures.faults import RawClient, eventually, kinds
from tests.fixtures.load import (
    EXECUTE,
    MODES,
    SYNC,
    Load,
    at_least,
    billed,
    bind,
    parse,
)


def simple(client: psycopg.Connection) -> int:
    for n in range(10):
        client.execute(f"SELECT {n}".encode())
    return 10


def extended(client: psycopg.Connection) -> int:
    for n in range(10):
        client.execute("SELECT %s::int", [n])
    return 10


def prepared(client: psycopg.Connection) -> int:
    for n in range(10):
        client.execute("SELECT %s::int + 1", [n], prepare=True)
    return 10


def pipelined(client: psycopg.Connection) -> int:
    with client.pipeline():
        for n in range(10):
            client.execute("SELECT %s::int + 2", [n])
    return 10


def transactions(client: psycopg.Connection) -> int:
    with client.transaction():
        client.execute("SELECT 1")
        with client.transaction():
            client.execute("SELECT 2")
    with pytest.raises(ZeroDivisionError), client.transaction():
        client.execute("SELECT 3")
        raise ZeroDivisionError
    # BEGIN, SAVEPOINT, RELEASE and COMMIT; BEGIN and ROLLBACK; three queries.
    return 4 + 2 + 3


def several(client: psycopg.Connection) -> int:
    client.execute(b"SELECT 1; SELECT ';--'; /* ; */ SELECT $$;$$;")
    client.execute(b"BEGIN; SELECT 1; COMMIT")
    return 6


def errors(client: psycopg.Connection) -> int:
    with pytest.raises(psycopg.errors.DivisionByZero):
        client.execute(b"SELECT 1/0")
    with pytest.raises(psycopg.errors.UndefinedTable):
        client.execute("SELECT %s::int FROM nowhere", [1])
    with pytest.raises(psycopg.errors.DivisionByZero):
        client.execute("SELECT 1 / %s::int", [0])
    return 3


def copies(client: psycopg.Connection) -> int:
    with client.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE IF NOT EXISTS numbers (n int)")
        with cursor.copy("COPY numbers FROM STDIN") as copy:
            for n in range(50):
                copy.write_row([n])
        with cursor.copy("COPY numbers TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) == 50
        cursor.execute("DROP TABLE numbers")
    return 4


FORMS = [simple, extended, pipelined, transactions, several, errors]


@pytest.mark.parametrize("mode", MODES)
def test_what_was_sent_is_what_is_billed(own_proxy: Proxy, mode: str) -> None:
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    # A temporary table outlives no transaction in transaction mode.
    forms = FORMS if mode == "transaction" else [*FORMS, copies]
    sent = 0
    # psycopg forgets what it prepared, with a query of its own, after some errors:
    # prepared statements have a connection for themselves.
    with (
        organization.connect(mode, prepare_threshold=None) as client,
        organization.connect(mode) as other,
    ):
        for form in random.sample(forms * 3, len(forms) * 3):
            sent += form(client) + prepared(other)
    own_proxy.stop()
    total = billed(organization)
    assert total["queries"] == sent
    assert total["bytes"] > sent * 10


def test_rows_and_bytes_are_those_of_the_answers(own_proxy: Proxy) -> None:
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    text = messages.query("SELECT repeat('x', 100) FROM generate_series(1, 1000)")
    with RawClient.logged_in(organization, "transaction") as client:
        client.send(text)
        answer = client.until(b"Z")
        size = sum(5 + len(body) for _, body in answer)
        client.query("SELECT 1 WHERE false")
    own_proxy.stop()
    total = billed(organization)
    assert total["rows"] == 1000
    assert size + len(text) <= total["bytes"] <= size + len(text) + 300


@pytest.mark.parametrize("mode", MODES)
def test_raw_forms_are_billed_once_each(own_proxy: Proxy, mode: str) -> None:
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    once = parse("SELECT 1") + bind() + EXECUTE
    failing = parse("SELECT 1/0") + bind() + EXECUTE
    forms = [
        (once + SYNC, 1, "12DCZ"),
        (once * 5 + SYNC, 5, "12DC" * 5 + "Z"),
        ((once + SYNC) * 5, 5, "12DCZ" * 5),
        (parse("SELECT 1", "a") + (bind("a") + EXECUTE) * 3 + SYNC, 3, None),
        # The first that fails is billed; what is skipped behind it did not run.
        (once + failing + once * 3 + SYNC, 2, "12DC1EZ"),
        # Parsed, described, closed: nothing ran.
        (parse("SELECT 2") + messages.message(b"D", b"S\0") + SYNC, 0, "1tTZ"),
        (SYNC * 3, 0, "ZZZ"),
        (messages.query(""), 1, "IZ"),
        (messages.query("; ;"), 1, "IZ"),
        (messages.query("SELECT 1; SELECT 1/0; SELECT 3"), 3, "TDCEZ"),
    ]
    sent = 0
    with RawClient.logged_in(organization, mode) as client:
        for data, count, expected in forms:
            client.send(data)
            got = "".join(kinds(client.until(b"Z")) for _ in range(ends(data)))
            assert expected is None or got == expected
            sent += count
    own_proxy.stop()
    assert billed(organization)["queries"] == sent


def ends(data: bytes) -> int:
    """How many ReadyForQuery are owed."""
    return max(data.count(SYNC), 1)


def test_a_refused_query_is_not_billed(own_proxy: Proxy) -> None:
    own_proxy.start()
    organization = own_proxy.create_organization(tier="free")
    answered = 0
    with organization.connect() as client:
        for _ in range(60):
            try:
                client.execute("SELECT 1")
                answered += 1
            except psycopg.errors.ConfigurationLimitExceeded:
                pass
    assert answered < 60
    own_proxy.stop()
    assert billed(organization)["queries"] == answered


def test_a_killed_proxy_bills_each_answered_query_once(own_proxy: Proxy) -> None:
    clients = 4
    own_proxy.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "0.3"
    own_proxy.settings["OGELPROXY_USAGE_SYNC_INTERVAL"] = "0.1"
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    dice = random.Random()
    answered = 0
    for round_number in range(1, 5):
        load = Load(organization, clients)
        load.start()
        load.wait_under_way()
        time.sleep(dice.uniform(0.05, 0.7))
        own_proxy.kill()
        load.join()
        answered += sum(load.replies)
        own_proxy.start()
        # What the killed one left is delivered by the next, under load or not.
        eventually(at_least(organization, answered))
        assert billed(organization)["queries"] <= answered + clients * round_number
    own_proxy.stop()
    total = billed(organization)["queries"]
    assert 0 <= total - answered <= clients * 4


def test_usage_waits_in_the_spool_while_the_control_plane_is_away(
    own_proxy: Proxy,
) -> None:
    own_proxy.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "0.2"
    own_proxy.settings["OGELPROXY_USAGE_SYNC_INTERVAL"] = "0.1"
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with organization.connect("transaction") as client:
        client.execute("SELECT 1")
        with renamed(own_proxy):
            before = billed(organization)["queries"]
            for _ in range(10):
                client.execute("SELECT 1")
                time.sleep(0.05)
            spool = own_proxy.directory / "spool"
            eventually(
                lambda: sum(1 for path in spool.rglob("*") if path.is_file()) > 3
            )
            assert billed(organization)["queries"] <= before + 1
        eventually(at_least(organization, 11), timeout=30)
        client.execute("SELECT 1")
    own_proxy.stop()
    assert billed(organization)["queries"] == 12


class renamed:
    """Within it the sink's table is not there: what it is given fails."""

    def __init__(self, proxy: Proxy) -> None:
        self._dsn = proxy.postgres.dsn(proxy.control)

    def _rename(self, old: str, new: str) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as control:
            control.execute(
                sql.SQL("ALTER TABLE platform.{} RENAME TO {}").format(
                    sql.Identifier(old), sql.Identifier(new)
                )
            )

    def __enter__(self) -> None:
        self._rename("usage_nodes", "usage_nodes_away")

    def __exit__(self, *_: object) -> None:
        self._rename("usage_nodes_away", "usage_nodes")
