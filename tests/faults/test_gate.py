"""The maximum of connections over workers and machines, whatever ends or freezes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis as Client

from ogelproxy import keys, slots
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

#: Connections that the free tier allows.
FREE = 5
#: Seconds within which slots of who was killed come back.
HEALING = 10.0


@pytest.fixture
def machines(
    postgres: Postgres, own_valkey: Valkey, tmp_path: Path
) -> Iterator[Callable[..., list[Proxy]]]:
    """Start proxies that share a control plane and a Redis."""
    made: list[Proxy] = []

    def start(count: int, *arguments: str, **settings: str) -> list[Proxy]:
        for number in range(count):
            directory = tmp_path / str(number)
            directory.mkdir()
            proxy = Proxy(
                postgres, directory, {"REDIS_URL": own_valkey.url, **settings}
            )
            proxy.arguments = list(arguments)
            if made:
                proxy.control = made[0].control
                proxy.secret_key = made[0].secret_key
            made.append(proxy)
            proxy.start()
        return made

    yield start
    for proxy in made:
        if proxy.process is not None and proxy.process.poll() is None:
            proxy.process.send_signal(signal.SIGCONT)
            assert proxy.stop() == 0
        assert "Traceback" not in proxy.log.read_text()


def free(proxy: Proxy) -> Organization:
    return proxy.create_organization(tier="free", limiter=LimiterMode.OFF)


def workers(proxy: Proxy) -> list[dict[str, Any]]:
    """What /status says of each worker."""
    with urllib.request.urlopen(proxy.admin_url("/status"), timeout=5) as answer:
        told: list[dict[str, Any]] = json.load(answer)["workers"]
    return told


def connect(organization: Organization, proxy: Proxy) -> psycopg.Connection | None:
    """Connect by `proxy`; None when there are too many connections."""
    dsn = proxy.dsn(organization.handle, organization.key, "transaction")
    try:
        return psycopg.connect(dsn, autocommit=True)
    except psycopg.OperationalError as error:
        assert "connection limit exceeded" in str(error), error
        return None


def fill(organization: Organization, proxy: Proxy) -> list[psycopg.Connection]:
    """Open as many connections as may be."""
    opened = []
    while (connection := connect(organization, proxy)) is not None:
        opened.append(connection)
    return opened


def is_alive(connection: psycopg.Connection) -> bool:
    try:
        return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def close(connections: list[psycopg.Connection]) -> None:
    for connection in connections:
        with contextlib.suppress(psycopg.Error):
            connection.close()


def test_of_many_logins_at_once_as_many_get_in_as_may(
    machines: Callable[..., list[Proxy]], own_valkey: Valkey
) -> None:
    first, second = machines(2, "--workers", "2")
    organization = first.create_organization(tier="pro", limiter=LimiterMode.OFF)
    maximum = 50
    dsns = [
        proxy.dsn(organization.handle, organization.key, "transaction")
        for proxy in (first, second)
    ]

    async def race() -> tuple[int, int]:
        opened = await asyncio.gather(
            *(
                psycopg.AsyncConnection.connect(dsns[number % 2], autocommit=True)
                for number in range(2 * maximum)
            ),
            return_exceptions=True,
        )
        refused = [each for each in opened if isinstance(each, BaseException)]
        assert all("connection limit exceeded" in str(error) for error in refused)
        connections = [
            each for each in opened if isinstance(each, psycopg.AsyncConnection)
        ]
        for connection in connections:
            await connection.close()
        return len(connections), len(refused)

    key = keys.connections(organization.handle)
    with Client.from_url(own_valkey.url) as client:
        for _ in range(3):
            assert asyncio.run(race()) == (maximum, maximum)
            # All that were closed are known to be.
            eventually(lambda: not client.exists(key))


def test_a_killed_worker_gives_its_places_back_at_once(
    machines: Callable[..., list[Proxy]],
) -> None:
    (proxy,) = machines(1, "--workers", "2")
    organization = free(proxy)
    held = fill(organization, proxy)
    assert len(held) == FREE
    victim = max(workers(proxy), key=lambda worker: worker["status"]["clients"])
    os.kill(victim["pid"], signal.SIGKILL)
    killed = time.monotonic()
    count = victim["status"]["clients"]
    eventually(lambda: sum(map(is_alive, held)) == FREE - count)
    left = [connection for connection in held if is_alive(connection)]
    more = fill(organization, proxy)
    assert len(more) == count
    # Not by a lease that ran out: the supervisor knew at once.
    assert time.monotonic() - killed < slots.LEASE_TTL - slots.RENEWAL_INTERVAL
    assert all(map(is_alive, [*left, *more]))
    close([*left, *more])


def test_a_killed_machine_s_places_are_free_within_ten_seconds(
    machines: Callable[..., list[Proxy]],
) -> None:
    first, second = machines(2)
    organization = free(first)
    held = fill(organization, first)
    assert len(held) == FREE
    assert connect(organization, second) is None
    first.kill()
    killed = time.monotonic()
    while (connection := connect(organization, second)) is None:
        assert time.monotonic() - killed < HEALING
        time.sleep(0.1)
    more = fill(organization, second)
    assert len(more) == FREE - 1
    close([connection, *more])


def test_a_machine_that_was_frozen_ends_the_newest_that_do_not_fit_any_more(
    machines: Callable[..., list[Proxy]],
) -> None:
    first, second = machines(2)
    organization = free(first)
    held = fill(organization, first)
    assert first.process is not None
    first.process.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    new: list[psycopg.Connection] = []
    while len(new) < 2:
        assert time.monotonic() - frozen < HEALING
        if (connection := connect(organization, second)) is not None:
            new.append(connection)
        else:
            time.sleep(0.1)
    first.process.send_signal(signal.SIGCONT)
    ends: dict[psycopg.Connection, str] = {}

    def have_ended() -> bool:
        for connection in held:
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError as error:
                ends.setdefault(connection, str(error))
        return len(ends) == 2

    eventually(have_ended)
    assert ends.keys() == set(held[-2:])
    for text in ends.values():
        assert "connection limit exceeded" in text
    assert have_ended()
    assert all(map(is_alive, new))
    assert connect(organization, first) is None
    assert connect(organization, second) is None
    close([*held, *new])


def test_connections_outlive_a_redis_that_comes_back_empty(
    machines: Callable[..., list[Proxy]], own_valkey: Valkey
) -> None:
    first, second = machines(2)
    organization = free(first)
    held = [connect(organization, proxy) for proxy in (first, first, second)]
    own_valkey.kill()
    assert all(connection is not None and is_alive(connection) for connection in held)
    own_valkey.start()
    started = time.monotonic()
    more = fill(organization, second)  # waits until all could have spoken
    assert 5.0 < time.monotonic() - started < HEALING
    assert len(more) == FREE - len(held)
    assert connect(organization, first) is None
    opened = [connection for connection in (*held, *more) if connection is not None]
    assert all(map(is_alive, opened))
    close(opened)


def test_strict_machines_end_connections_that_nobody_can_prove(
    machines: Callable[..., list[Proxy]], own_valkey: Valkey
) -> None:
    (proxy,) = machines(1, "--workers", "2", OGELPROXY_LIMITS_FLOOR="0")
    organization = free(proxy)
    held = fill(organization, proxy)
    own_valkey.kill()
    killed = time.monotonic()
    ends: dict[psycopg.Connection, str] = {}

    def have_ended() -> bool:
        for connection in held:
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError as error:
                ends.setdefault(connection, str(error))
        return len(ends) == FREE

    eventually(have_ended, timeout=2 * HEALING)
    assert time.monotonic() - killed < slots.LEASE_TTL + 1.0
    assert all("can't check your limits" in text for text in ends.values()), ends
