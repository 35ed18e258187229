"""Organisations whose databases lie on one Postgres share its connections.

What each has is looked at where it is, in pg_stat_activity.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

SLOTS = 10
QUEUE_TIMEOUT = 3.0


@pytest.fixture
def shared(own_proxy: Proxy) -> Proxy:
    """A proxy that opens ten servers at one address."""
    own_proxy.settings |= {
        "OGELPROXY_POOL_MAX_SERVERS_PER_ADDRESS": str(SLOTS),
        "OGELPROXY_POOL_MAX_SERVERS": "100",
        "OGELPROXY_POOL_QUEUE_TIMEOUT": str(QUEUE_TIMEOUT),
        "OGELPROXY_POOL_SERVER_IDLE_TIMEOUT": "60",
    }
    own_proxy.start()
    return own_proxy


def organization(
    proxy: Proxy, tier: str, mode: PoolMode = PoolMode.TRANSACTION
) -> Organization:
    return proxy.create_organization(tier=tier, limiter=LimiterMode.OFF, modes=[mode])


class Watch:
    """Looks, as often as it can, at whose servers there are."""

    def __init__(self, organizations: list[Organization]) -> None:
        self._dsn = organizations[0].proxy.postgres.dsn()
        self._names = {
            each.direct_dsn.rsplit("/", 1)[1]: each.handle for each in organizations
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._seen: Counter[str] = Counter()
        self._looks = 0
        self._pids: set[int] = set()
        self.most = 0
        self.pids: dict[int, set[str]] = {}
        self.present: Counter[str] = Counter()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def forget(self) -> None:
        """Begin to average anew."""
        self._seen, self._looks = Counter(), 0

    def mean(self, one: Organization) -> float:
        """How many servers it had on average."""
        return self._seen[one.handle] / max(self._looks, 1)

    def _look(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._done.wait(0.002):
                rows = connection.execute(
                    "SELECT pid, datname FROM pg_stat_activity "
                    # Autovacuum's workers are no servers of the proxy's.
                    "WHERE datname = ANY (%s) AND backend_type = 'client backend'",
                    [list(self._names)],
                ).fetchall()
                # Those of two looks were all there at once in between: one look
                # alone takes a while, in which one may end and another begin.
                pids = {pid for pid, _ in rows}
                self.most = max(self.most, len(pids & self._pids))
                self._pids = pids
                self._looks += 1
                self.present = Counter(self._names[name] for _, name in rows)
                self._seen.update(self.present)
                for pid, name in rows:
                    self.pids.setdefault(pid, set()).add(name)


@contextmanager
def load(
    one: Organization, clients: int, query: str = "SELECT pg_sleep(0.005)"
) -> Iterator[list[float]]:
    """Clients that query without a pause; yields the seconds that each query took."""
    done = threading.Event()
    took: list[float] = []

    def work() -> None:
        with one.connect() as connection:
            while not done.is_set():
                began = time.monotonic()
                connection.execute(query)  # type: ignore[call-overload]
                took.append(time.monotonic() - began)

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(work) for _ in range(clients)]
        try:
            yield took
        finally:
            done.set()
    for future in futures:
        future.result()


def test_a_lone_client_is_served_beside_a_noisy_organisation(shared: Proxy) -> None:
    noisy, quiet = organization(shared, "enterprise"), organization(shared, "free")
    with Watch([noisy, quiet]) as watch:
        with load(noisy, 40), quiet.connect() as client:
            eventually(lambda: watch.present[noisy.handle] >= SLOTS - 1)
            client.execute("SELECT 1")
            watch.forget()
            took = []
            for _ in range(100):
                began = time.monotonic()
                client.execute("SELECT 1")
                took.append(time.monotonic() - began)
                time.sleep(0.01)
            # One server is always its own: it waits for the processor only.
            assert sorted(took)[50] < 0.2
            assert max(took) < 1
            # A place is free once Postgres has closed the socket; a look may fall
            # between the two.
            assert watch.mean(quiet) == pytest.approx(1, abs=0.05)
            assert watch.mean(noisy) == pytest.approx(SLOTS - 1, abs=0.2)
    assert watch.most <= SLOTS
    assert all(len(names) == 1 for names in watch.pids.values())


def test_servers_follow_the_weights_and_go_where_they_are_needed(
    shared: Proxy,
) -> None:
    tiers = ("starter", "pro", "enterprise")
    all_of = {tier: organization(shared, tier) for tier in tiers}
    with Watch(list(all_of.values())) as watch:
        with load(all_of["pro"], 15), load(all_of["enterprise"], 15) as big:
            with load(all_of["starter"], 10):
                time.sleep(1)
                watch.forget()
                time.sleep(4)
                means = [watch.mean(all_of[tier]) for tier in tiers]
            # Weights 2, 10 and 40: one is guaranteed, nine are 10 to 40.
            assert means == pytest.approx([1, 1.8, 7.2], rel=0.25)
            eventually(lambda: watch.present[all_of["starter"].handle] == 0)
            watch.forget()
            time.sleep(2)
            assert watch.mean(all_of["enterprise"]) == pytest.approx(8, rel=0.25)
        # Nobody waited for long while places moved.
        assert max(big) < 2
        assert watch.most <= SLOTS
        assert all(len(names) == 1 for names in watch.pids.values())


def test_more_organisations_than_servers_take_turns(shared: Proxy) -> None:
    tenants = [organization(shared, "free") for _ in range(2 * SLOTS)]
    with Watch(tenants) as watch, ThreadPoolExecutor(len(tenants)) as pool:

        def work(tenant: Organization) -> int:
            count = 0
            with tenant.connect() as connection:
                end = time.monotonic() + 5
                while time.monotonic() < end:
                    connection.execute("SELECT pg_sleep(0.001)")
                    count += 1
            return count

        counts = list(pool.map(work, tenants))
        means = [watch.mean(tenant) for tenant in tenants]
    assert min(counts) > 20
    assert min(means) > 0.5 * max(means)
    assert watch.most <= SLOTS


def test_who_waits_too_long_is_told(shared: Proxy) -> None:
    hog = organization(shared, "enterprise", PoolMode.SESSION)
    late = organization(shared, "free")
    sessions = [hog.connect() for _ in range(SLOTS)]
    for session in sessions:
        session.execute("SELECT 1")
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="no server connection free"):
        late.connect()
    assert QUEUE_TIMEOUT <= time.monotonic() - began < QUEUE_TIMEOUT + 3
    # A session that ends gives its server to who has none.
    sessions.pop().close()
    with late.connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
    for session in sessions:
        assert session.execute("SELECT 1").fetchone() == (1,)
        session.close()


def test_a_change_of_weight_or_bound_reaches_a_running_proxy(
    shared: Proxy, postgres: Postgres
) -> None:
    one, two = organization(shared, "starter"), organization(shared, "pro")
    with Watch([one, two]) as watch, load(one, 10), load(two, 15):
        time.sleep(1)
        watch.forget()
        time.sleep(2)
        assert watch.mean(one) == pytest.approx(SLOTS / 6, rel=0.3)
        postgres.execute(
            "UPDATE platform.tier_limits SET weight = 10 WHERE name = 'starter'",
            dbname=shared.control,
        )
        time.sleep(1)
        watch.forget()
        time.sleep(2)
        assert watch.mean(one) == pytest.approx(SLOTS / 2, rel=0.3)
    assert watch.most <= SLOTS


def test_workers_divide_the_bound_among_themselves(
    own_proxy: Proxy, valkey: Valkey
) -> None:
    own_proxy.settings |= {
        "OGELPROXY_WORKERS": "2",
        "REDIS_URL": valkey.url,
        "OGELPROXY_POOL_MAX_SERVERS_PER_ADDRESS": str(SLOTS),
        "OGELPROXY_POOL_MAX_SERVERS": "100",
    }
    own_proxy.start()
    one, two = organization(own_proxy, "pro"), organization(own_proxy, "pro")
    with Watch([one, two]) as watch, load(one, 30), load(two, 30):
        eventually(lambda: watch.most == SLOTS, 20)
        watch.forget()
        time.sleep(2)
        # The kernel spreads clients over workers: 30 don't all go to one.
        assert watch.mean(one) == pytest.approx(SLOTS / 2, rel=0.3)
    assert watch.most == SLOTS
