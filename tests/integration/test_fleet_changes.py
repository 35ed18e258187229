"""How long a change of tier by plain SQL takes to reach every process.

Run with `-s` to read the figures: the median and the worst of a hundred.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.fleet import PROMPT, Plane, Process, until
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

CHANGES = 100
MOVE = "UPDATE platform.organizations SET tier = %s WHERE handle = %s"
#: Tiers and their queries per second (spec, section 3).
TIERS = {"starter": 50.0, "pro": 200.0}

Fault = Callable[[Plane, Sequence[Process]], Awaitable[None]]


async def nothing(plane: Plane, processes: Sequence[Process]) -> None:
    """Everything works."""


async def cut_listening(plane: Plane, processes: Sequence[Process]) -> None:
    processes[0].to_listen.cut()
    await until(lambda: processes[0].directory.is_degraded)


async def cut_postgres(plane: Plane, processes: Sequence[Process]) -> None:
    processes[0].to_postgres.cut()
    await until(lambda: processes[0].directory.is_degraded)


async def cut_redis(plane: Plane, processes: Sequence[Process]) -> None:
    processes[0].to_redis.cut()
    await until(lambda: not processes[0].heard.is_set())


async def kill_redis(plane: Plane, processes: Sequence[Process]) -> None:
    plane.valkey.kill()
    await until(lambda: not any(each.heard.is_set() for each in processes))


async def restart_redis(plane: Plane, processes: Sequence[Process]) -> None:
    """Redis is back and empty, and one process has nothing else."""
    await kill_redis(plane, processes)
    plane.valkey.start()
    await until(lambda: all(each.heard.is_set() for each in processes))
    await cut_postgres(plane, processes)


def report(what: str, seconds: Sequence[float]) -> None:
    """Print the figures, and hold them against the bound."""
    median, worst = statistics.median(seconds), max(seconds)
    print(
        f"\n{what}: median {median * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms "
        f"of {len(seconds)}"
    )
    assert worst < PROMPT


@pytest.mark.parametrize(
    "fault",
    [nothing, cut_listening, cut_postgres, cut_redis, kill_redis, restart_redis],
)
async def test_a_change_reaches_the_subscribers_of_all_processes_within_a_second(
    plane: Plane, fault: Fault
) -> None:
    await plane.populate()
    seconds = []
    async with plane.processes(4) as processes:
        for each in processes:
            await each.directory.find(plane.handle)
            each.directory.hold(plane.handle)
        await until(lambda: not any(p.directory.is_degraded for p in processes))
        await fault(plane, processes)
        async with await psycopg.AsyncConnection.connect(
            plane.url, autocommit=True
        ) as connection:
            for tier in itertools.islice(itertools.cycle(TIERS), CHANGES):
                since = time.monotonic()
                await connection.execute(MOVE, [tier, plane.handle])
                told = await asyncio.gather(*(until_tier(p, tier) for p in processes))
                seconds.append(max(told) - since)
    report(f"4 processes, {fault.__name__}", seconds)


async def until_tier(process: Process, tier: str) -> float:
    """Wait until subscribers are told of that tier; when that was."""
    while True:
        at, new = await asyncio.wait_for(process.told.get(), 10)
        assert new is not None
        if new.tier.name == tier:
            return at


@pytest.fixture
def fleet(postgres: Postgres, valkey: Valkey, tmp_path: Path) -> Iterator[list[Proxy]]:
    """Three proxies, each a process, with one control plane and one Redis."""
    proxies: list[Proxy] = []
    with ExitStack() as stack:
        for number in range(3):
            directory = tmp_path / str(number)
            directory.mkdir()
            proxy = Proxy(postgres, directory, {"REDIS_URL": valkey.url})
            if proxies:
                proxy.control = proxies[0].control
                proxy.secret_key = proxies[0].secret_key
            proxies.append(proxy)
            proxy.start()
            stack.callback(proxy.stop)
        yield proxies


def test_a_change_reaches_live_connections_of_all_processes_within_a_second(
    fleet: list[Proxy],
) -> None:
    organization = fleet[0].create_organization(tier="starter")
    seconds = []
    with ExitStack() as stack:
        clients = [
            stack.enter_context(psycopg.connect(dsn_at(proxy, organization)))
            for proxy in fleet
        ]
        for client in clients:
            client.autocommit = True
        plain = psycopg.connect(
            organization.proxy.postgres.dsn(fleet[0].control), autocommit=True
        )
        stack.enter_context(plain)
        for tier in itertools.islice(itertools.cycle(reversed(TIERS)), CHANGES):
            since = time.monotonic()
            plain.execute(MOVE, [tier, organization.handle])
            waiting = list(clients)
            while waiting:
                assert time.monotonic() - since < 10
                waiting = [each for each in waiting if rate(each) != TIERS[tier]]
            seconds.append(time.monotonic() - since)
    report("live connections through 3 proxies", seconds)


def dsn_at(proxy: Proxy, organization: Organization) -> str:
    return proxy.dsn(organization.handle, organization.key, "app")


def rate(client: psycopg.Connection) -> float:
    """The queries per second that the connection may make now."""
    cursor = client.execute("SHOW o7s.limits")
    row = cursor.fetchone()
    assert row is not None and cursor.description is not None
    names = [column.name for column in cursor.description]
    return float(row[names.index("queries_per_second")])
