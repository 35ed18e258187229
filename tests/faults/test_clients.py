"""Clients that go away half-way: nothing of theirs stays, nobody else sees it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import psycopg
import pytest

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, eventually, kinds, status, unharmed

MODES = ["session", "transaction", "auto"]
WAYS = [RawClient.close, RawClient.reset]

each_way = pytest.mark.parametrize("leave", WAYS, ids=["close", "reset"])
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def direct(organization: Organization) -> psycopg.Connection:
    """A connection to the organisation's database without the proxy."""
    return psycopg.connect(organization.direct_dsn, autocommit=True)


def count(direct: psycopg.Connection, query: str) -> int:
    row = direct.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def running(direct: psycopg.Connection, tag: str) -> Callable[[], bool]:
    """Whether a query with `tag` in its text runs."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' "
        f"AND query LIKE '%{tag}%' AND pid <> pg_backend_pid()"
    )
    return lambda: count(direct, query) > 0


def insert_and_flush(table: str) -> bytes:
    """A batch that inserts a row, answered but not ended."""
    return b"".join(
        (
            messages.message(b"P", f"\0INSERT INTO {table} VALUES (1)\0\0\0".encode()),
            messages.message(b"B", bytes(8)),
            messages.message(b"E", bytes(5)),
            messages.message(b"H", b""),
        )
    )


@each_mode
@each_way
def test_the_query_of_a_client_that_died_is_cancelled(
    proxy: Proxy,
    organization: Organization,
    direct: psycopg.Connection,
    mode: str,
    leave: Callable[[RawClient], None],
) -> None:
    tag = f"left_{mode}_{leave.__name__}"
    is_running = running(direct, tag)
    with direct, unharmed(proxy, organization):
        client = RawClient.logged_in(organization, mode)
        client.send(messages.query(f"SELECT pg_sleep(60) AS {tag}"))
        eventually(is_running)
        leave(client)
        eventually(lambda: not is_running(), timeout=2)


@each_mode
@each_way
def test_the_transaction_of_a_client_that_died_is_rolled_back(
    proxy: Proxy,
    organization: Organization,
    direct: psycopg.Connection,
    mode: str,
    leave: Callable[[RawClient], None],
) -> None:
    with direct, unharmed(proxy, organization):
        direct.execute("DROP TABLE IF EXISTS left_behind")
        direct.execute("CREATE TABLE left_behind (n int)")
        direct.execute("SET lock_timeout = '2s'")
        client = RawClient.logged_in(organization, mode)
        client.query("BEGIN")
        client.query("LOCK TABLE left_behind")
        assert client.query("INSERT INTO left_behind VALUES (1)")[-1] == (b"Z", b"T")
        leave(client)
        assert count(direct, "SELECT count(*) FROM left_behind") == 0
        with organization.connect(mode) as next_client:
            status = next_client.info.transaction_status
            assert status is psycopg.pq.TransactionStatus.IDLE
            next_client.execute("DROP TABLE left_behind")


@each_mode
@each_way
def test_half_a_copy_leaves_no_row(
    proxy: Proxy,
    organization: Organization,
    direct: psycopg.Connection,
    mode: str,
    leave: Callable[[RawClient], None],
) -> None:
    is_running = running(direct, "COPY half")
    with direct, unharmed(proxy, organization):
        direct.execute("DROP TABLE IF EXISTS half")
        direct.execute("CREATE TABLE half (n int)")
        client = RawClient.logged_in(organization, mode)
        client.send(messages.query("COPY half FROM STDIN"))
        client.until(b"G")
        client.send(messages.message(b"d", b"1\n" * 1000))
        # A message of which the rest never comes.
        client.send(b"d" + struct.pack(">i", 10_000) + b"2\n" * 100)
        leave(client)
        eventually(lambda: not is_running(), timeout=2)
        assert count(direct, "SELECT count(*) FROM half") == 0
        with organization.connect(mode) as next_client:
            next_client.execute("DROP TABLE half")


@each_mode
@each_way
def test_a_copy_that_nobody_reads_any_more_is_cancelled(
    proxy: Proxy,
    organization: Organization,
    direct: psycopg.Connection,
    mode: str,
    leave: Callable[[RawClient], None],
) -> None:
    is_running = running(direct, "unread")
    with direct, unharmed(proxy, organization):
        client = RawClient.logged_in(organization, mode)
        client.send(
            messages.query(
                "COPY (SELECT repeat('x', 1000) AS unread "
                "FROM generate_series(1, 1e7)) TO STDOUT"
            )
        )
        assert kinds([client.receive() for _ in range(3)]) == "Hdd"
        assert is_running()
        leave(client)
        eventually(lambda: not is_running(), timeout=5)


@each_mode
def test_half_a_query_never_runs(
    proxy: Proxy, organization: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with direct, unharmed(proxy, organization):
        direct.execute("DROP TABLE IF EXISTS unborn")
        for size in (30, 200_000, 3_000_000):
            client = RawClient.logged_in(organization, mode)
            query = messages.query("CREATE TABLE unborn (n int) --" + "x" * size)
            client.send(query[:-1])
            client.close()
        eventually(lambda: status(organization)["clients"] <= 1)
        assert count(direct, "SELECT count(to_regclass('unborn'))") == 0


@each_mode
def test_a_batch_without_its_sync_is_not_committed(
    proxy: Proxy, organization: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with direct, unharmed(proxy, organization):
        direct.execute("DROP TABLE IF EXISTS batch")
        direct.execute("CREATE TABLE batch (n int)")
        client = RawClient.logged_in(organization, mode)
        client.send(insert_and_flush("batch"))
        assert kinds(client.until(b"C")) == "12C"
        client.close()
        direct.execute("SET lock_timeout = '2s'")
        direct.execute("ALTER TABLE batch ADD m int")
        assert count(direct, "SELECT count(*) FROM batch") == 0


@each_mode
def test_what_a_dead_client_made_is_not_seen_by_the_next(
    proxy: Proxy, organization: Organization, mode: str
) -> None:
    with unharmed(proxy, organization):
        client = RawClient.logged_in(organization, mode)
        client.query("CREATE TEMP TABLE mine (n int)")
        client.query("SET search_path = pg_catalog")
        client.query("SELECT pg_advisory_lock(77)")
        client.query("PREPARE plan AS SELECT 1")
        client.query("BEGIN")
        client.reset()
        eventually(lambda: status(organization)["clients"] <= 1)
        for _ in range(3):
            with organization.connect(mode) as after:
                row = after.execute(
                    "SELECT to_regclass('pg_temp.mine'), "
                    "current_setting('search_path'), "
                    "(SELECT count(*) FROM pg_prepared_statements "
                    "WHERE name = 'plan'), "
                    "(SELECT count(*) FROM pg_locks WHERE objid = 77)"
                ).fetchone()
                assert row == (None, '"$user", public', 0, 0)


def test_a_client_that_dies_in_the_queue_takes_no_server(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_POOL_MAX_SERVERS"] = "1"
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as holder:
        holder.query("BEGIN")
        dying = [RawClient.logged_in(organization, "transaction") for _ in range(6)]
        waiter = RawClient.logged_in(organization, "transaction")
        for client in (*dying, waiter):
            client.send(messages.query("SELECT 1"))
        eventually(lambda: status(organization)["waiting"] == 7)
        for number, client in enumerate(dying):
            WAYS[number % 2](client)
        eventually(lambda: status(organization)["waiting"] == 1)
        holder.query("COMMIT")
        assert kinds(waiter.until(b"Z")) == "TDCZ"
        waiter.close()
    eventually(lambda: status(organization)["clients"] == 0)
    assert status(organization)["servers"] == 1


@each_way
def test_a_client_that_dies_while_it_is_throttled_leaves_nothing(
    proxy: Proxy, leave: Callable[[RawClient], None]
) -> None:
    throttled = proxy.create_organization(tier="free", max_wait=60.0)
    organization = proxy.create_organization(limiter=LimiterMode.OFF)
    with unharmed(proxy, organization):
        client = RawClient.logged_in(throttled, "transaction")
        # A second's worth of queries, and one more than that.
        client.send(messages.query("SELECT 1") * 11)
        for _ in range(10):
            assert kinds(client.until(b"Z")) == "TDCZ"
        client.send(messages.query("CREATE TABLE throttled ()") * 200)
        leave(client)
        eventually(lambda: status(throttled)["clients"] == 0)
        assert status(throttled)["waiting"] == 0
        with throttled.connect("session") as after:
            assert after.execute("SELECT 1").fetchone() == (1,)


@each_way
def test_a_client_that_dies_while_its_settings_are_proven_takes_no_server(
    own_proxy: Proxy, leave: Callable[[RawClient], None]
) -> None:
    own_proxy.settings["OGELPROXY_POOL_MAX_SERVERS"] = "1"
    own_proxy.start()
    organization = own_proxy.create_organization(tier="free", limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as holder:
        holder.query("BEGIN")
        # As many as the tier lets in beside it: what they leave is seen below.
        dying = [RawClient(own_proxy) for _ in range(4)]
        for number, client in enumerate(dying):
            packet = {
                "user": organization.handle,
                "database": "transaction",
                "work_mem": f"{100 + number}kB",
            }
            client.send(messages.startup(packet))
            client.authenticate(organization.key)
            leave(client)
        holder.query("COMMIT")
        eventually(lambda: status(organization)["idle"] == 1)
        with organization.connect("transaction") as after:
            assert after.execute("SHOW work_mem").fetchone() != ("100kB",)
    eventually(lambda: status(organization)["clients"] == 0)
    assert status(organization)["servers"] == 1
    others = [organization.connect("transaction") for _ in range(5)]
    for each in others:
        each.close()


def test_a_client_that_never_reads_blocks_nobody(
    proxy: Proxy, organization: Organization
) -> None:
    with RawClient.logged_in(organization, "transaction") as slow:
        slow.send(
            messages.query("SELECT repeat('x', 1000) FROM generate_series(1, 1e6)")
        )
        slow.receive()
        before = proxy.memory_kb
        with unharmed(proxy, organization):
            with organization.connect("transaction") as beside:
                for n in range(200):
                    row = beside.execute("SELECT %s::int", [n]).fetchone()
                    assert row == (n,)
        assert proxy.memory_kb - before < 20_000


@pytest.mark.parametrize("mode", ["transaction", "auto"])
def test_a_flushed_batch_shares_its_transaction_with_nobody(
    organization: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with direct, RawClient.logged_in(organization, mode) as client:
        direct.execute("DROP TABLE IF EXISTS flushed")
        direct.execute("CREATE TABLE flushed (n int)")
        client.send(insert_and_flush("flushed"))
        assert kinds(client.until(b"C")) == "12C"
        with organization.connect(mode) as beside:
            row = beside.execute("SELECT count(*) FROM flushed").fetchone()
            assert row == (0,)
        client.send(messages.message(b"S", b""))
        assert client.receive() == (b"Z", b"I")
        assert count(direct, "SELECT count(*) FROM flushed") == 1
