"""How many queries of an organisation may be under way at once, and who waits.

What runs is counted where it runs, in pg_stat_activity.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    FLUSH,
    SYNC,
    Wire,
    bind,
    execute,
    kinds,
    parse,
    query,
)

MODES = ("session", "transaction", "auto")
QUEUE_TIMEOUT = 1.0

Refused = psycopg.errors.ConfigurationLimitExceeded


@pytest.fixture(scope="module")
def crowded(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy whose tier `pair` allows two at once, and `single` one."""
    proxy = Proxy(
        postgres,
        tmp_path_factory.mktemp("crowded"),
        {"OGELPROXY_POOL_QUEUE_TIMEOUT": str(QUEUE_TIMEOUT)},
    )
    proxy.start()
    for name, most in (("single", 1), ("pair", 2)):
        add_tier(proxy, name, most)
    try:
        yield proxy
    finally:
        proxy.stop()


def add_tier(proxy: Proxy, name: str, most: int) -> None:
    with psycopg.connect(proxy.postgres.dsn(proxy.control)) as connection:
        connection.execute(
            "INSERT INTO platform.tier_limits (name, max_connections, "
            "max_queries_per_second, max_storage_gb, may_burst, monthly_fee, "
            "included_vcpu_hours, included_memory_gb_hours, max_databases, "
            "max_in_flight) VALUES (%s, 100, 100000, 1, true, 0, 1, 1, 9, %s)",
            [name, most],
        )


@pytest.fixture
def single(crowded: Proxy) -> Organization:
    return crowded.create_organization(tier="single")


@pytest.fixture
def pair(crowded: Proxy) -> Organization:
    return crowded.create_organization(tier="pair")


class Watch:
    """Looks, as often as it can, at how many queries an organisation has running."""

    def __init__(self, organization: Organization) -> None:
        self._dsn = organization.proxy.postgres.dsn()
        self._database = organization.direct_dsn.rsplit("/", 1)[1]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        before: set[tuple[object, ...]] = set()
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._done.is_set():
                rows = connection.execute(
                    "SELECT pid, query_start FROM pg_stat_activity "
                    "WHERE datname = %s AND state <> 'idle' "
                    # Autovacuum's workers are no servers of the proxy's.
                    "AND backend_type = 'client backend' "
                    # Not a server that the proxy opens or resets.
                    "AND query <> '' AND query NOT LIKE 'DISCARD%%'",
                    [self._database],
                ).fetchall()
                # Those of two looks were all under way at once in between: one look
                # alone takes a while, in which one may end and another begin.
                now = set(rows)
                self.most = max(self.most, len(now & before))
                before = now


def waits(proxy: Proxy) -> float:
    """How often anybody waited for others in flight, ever."""
    with urllib.request.urlopen(proxy.admin_url("/metrics"), timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("o7s_in_flight_waits_total{")
    )


def until_waiting(proxy: Proxy, act: Callable[[], object], count: int = 1) -> None:
    """Do something that makes `count` clients wait, and see that they do."""
    before = waits(proxy)
    act()
    eventually(lambda: waits(proxy) == before + count)


def in_flight(client: psycopg.Connection) -> tuple[int, int]:
    row = client.execute("SHOW o7s.limits").fetchone()
    assert row is not None
    return row[-2], row[-1]


@pytest.mark.parametrize("mode", MODES)
def test_exactly_as_many_run_as_may(pair: Organization, mode: str) -> None:
    def work(number: int) -> None:
        with pair.connect(mode) as client:
            for _ in range(5):
                client.execute("SELECT pg_sleep(0.02)")
                with client.transaction():
                    client.execute("SELECT 1")
                    client.execute("SELECT pg_sleep(0.01)")

    with Watch(pair) as watch, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert watch.most == 2
    with pair.connect(mode) as client:
        assert in_flight(client) == (0, 2)


@pytest.mark.parametrize("mode", MODES)
def test_pipelines_of_many_clients_are_answered_in_full(
    pair: Organization, mode: str
) -> None:
    batch = parse("SELECT pg_sleep(0.002), $1::int", "", [23]) + b"".join(
        bind([str(number).encode()]) + execute() for number in range(3)
    )

    def work(number: int) -> None:
        with Wire(pair.dsn(mode)) as client:
            client.send((batch + SYNC) * 10 + query("SELECT 7"))
            answers = client.until("Z" * 11)
            assert kinds(answers) == "12DC2DC2DCZ" * 10 + "TDCZ"

    with Watch(pair) as watch, ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert 1 <= watch.most <= 2


@pytest.mark.parametrize("mode", MODES)
def test_who_came_first_goes_first(single: Organization, mode: str) -> None:
    with psycopg.connect(single.direct_dsn) as direct:
        direct.execute("CREATE SEQUENCE turns")
    with single.connect(mode) as holder:
        holder.execute("BEGIN")
        clients = [Wire(single.dsn(mode)) for _ in range(5)]
        for client in clients:
            ask = query("SELECT nextval('turns')")
            until_waiting(single.proxy, lambda c=client, q=ask: c.send(q))  # type: ignore[misc]
        holder.execute("COMMIT")
        rows = [client.until("Z")[1].body for client in clients]
        for client in clients:
            client.sock.close()
    assert [int(row[6:]) for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("mode", MODES)
def test_an_open_transaction_never_waits(single: Organization, mode: str) -> None:
    with single.connect(mode) as holder, Wire(single.dsn(mode)) as other:
        holder.execute("BEGIN")
        until_waiting(single.proxy, lambda: other.send(query("SELECT 1")))
        before = waits(single.proxy)
        for _ in range(3):
            holder.execute("SELECT 1")
        assert in_flight(holder) == (1, 1)
        holder.execute("ROLLBACK")
        assert kinds(other.until("Z")) == "TDCZ"
        assert waits(single.proxy) == before


@pytest.mark.parametrize("mode", MODES)
def test_who_waits_too_long_is_told_and_stays(single: Organization, mode: str) -> None:
    with single.connect(mode) as holder, single.connect(mode) as other:
        other.execute("SELECT 1")
        holder.execute("BEGIN")
        began = time.monotonic()
        with pytest.raises(Refused, match="too many queries in flight") as refusal:
            other.execute("SELECT 1")
        assert QUEUE_TIMEOUT < time.monotonic() - began < QUEUE_TIMEOUT + 2
        assert refusal.value.diag.message_detail == "tier=single limit=1"
        with pytest.raises(Refused):
            other.execute("SELECT %s::int", [1])  # by the extended protocol
        holder.execute("COMMIT")
        assert other.execute("SELECT %s::int", [2]).fetchone() == (2,)
        assert in_flight(other) == (0, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_wait_can_be_cancelled(single: Organization, mode: str) -> None:
    with single.connect(mode) as holder, Wire(single.dsn(mode)) as other:
        holder.execute("BEGIN")
        until_waiting(single.proxy, lambda: other.send(query("SELECT 1")))
        other.cancel()
        error, _ = other.until("Z")
        assert error.fields()["C"] == "57014"
        holder.execute("COMMIT")
        assert kinds(other.ask(query("SELECT 1"))) == "TDCZ"


@pytest.mark.parametrize("mode", MODES)
def test_who_leaves_while_waiting_leaves_no_gap(
    single: Organization, mode: str
) -> None:
    with single.connect(mode) as holder, Wire(single.dsn(mode)) as last:
        holder.execute("BEGIN")
        with Wire(single.dsn(mode)) as leaving:
            until_waiting(single.proxy, lambda: leaving.send(query("SELECT 1")))
        until_waiting(single.proxy, lambda: last.send(query("SELECT 1")))
        holder.execute("COMMIT")
        assert kinds(last.until("Z")) == "TDCZ"
        assert in_flight(holder) == (0, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_query_counts_until_it_has_ended_though_its_client_left(
    single: Organization, mode: str
) -> None:
    with Watch(single) as watch, Wire(single.dsn(mode)) as other:
        with Wire(single.dsn(mode)) as leaving:
            leaving.send(query("SELECT pg_sleep(30)"))
            eventually(lambda: watch.most == 1)
            until_waiting(
                single.proxy, lambda: other.send(query("SELECT pg_sleep(0.1)"))
            )
        assert kinds(other.until("Z")) == "TDCZ"
    assert watch.most == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_counts_until_its_sync(single: Organization, mode: str) -> None:
    with Wire(single.dsn(mode)) as first, Wire(single.dsn(mode)) as second:
        first.send(parse("SELECT 1") + bind() + execute() + FLUSH)
        first.until("C")
        until_waiting(single.proxy, lambda: second.send(query("SELECT 2")))
        first.ask(SYNC)
        assert kinds(second.until("Z")) == "TDCZ"


def test_a_pinned_client_counts_while_it_works(single: Organization) -> None:
    with single.connect("auto") as pinned, single.connect("auto") as other:
        pinned.execute("CREATE TEMP TABLE mine (id int)")
        assert in_flight(pinned) == (0, 1)
        other.execute("BEGIN")
        with pytest.raises(Refused):
            pinned.execute("SELECT * FROM mine")
        other.execute("COMMIT")
        assert pinned.execute("SELECT count(*) FROM mine").fetchone() == (0,)


def test_a_limit_that_is_raised_lets_who_waits_go(crowded: Proxy) -> None:
    add_tier(crowded, "growing", 1)
    tenant = crowded.create_organization(tier="growing")
    with tenant.connect() as holder, Wire(tenant.dsn()) as other:
        holder.execute("BEGIN")
        until_waiting(crowded, lambda: other.send(query("SELECT 1")))
        crowded.postgres.execute(
            "UPDATE platform.tier_limits SET max_in_flight = NULL "
            "WHERE name = 'growing'",
            dbname=crowded.control,
        )
        assert kinds(other.until("Z")) == "TDCZ"
        assert in_flight(holder) == (1, None)


def test_without_an_enforcing_limiter_nobody_waits(crowded: Proxy) -> None:
    tenant = crowded.create_organization(tier="single", limiter=LimiterMode.OFF)
    with tenant.connect() as holder, tenant.connect() as other:
        holder.execute("BEGIN")
        assert other.execute("SELECT 1").fetchone() == (1,)
        assert in_flight(other) == (1, None)
