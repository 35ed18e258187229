"""Tenant records in Redis: several directories, one Valkey, one real Postgres.

Each directory is what an engine of another process has: a store and a Redis of its
own. They reach their servers through links that can be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import LiteralString
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from redis import Redis as Client

from ogelproxy import keys
from ogelproxy.config import Control, Secret
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.errors import ControlUnavailable
from ogelproxy.redis import Redis
from ogelproxy.tenants.cache import TenantCache
from ogelproxy.tenants.directory import Directory
from ogelproxy.tenants.model import DatabaseType, Tenant
from ogelproxy.tenants.seal import unseal
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from tests.fixtures.faults import PATIENCE
from tests.fixtures.link import Link
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

ME = "test"
#: Seconds in which a change takes effect (spec, layer 1).
PROMPT = 1.0
DSN = "postgresql://role:password-of-it@10.0.0.1/db"


def through(url: str, port: int) -> str:
    """The URL of a server by way of another port of this machine."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{port}"))


def in_clear(url: str) -> str:
    """The URL of a Postgres whose clients say who they are in their first packet."""
    return f"{url}?sslmode=disable"


def is_listener(first: bytes) -> bool:
    return b"ogelproxy listener" in first


class Process:
    """What one process has of tenants, and the ways to its servers."""

    def __init__(self, plane: Plane, **control: float) -> None:
        stack = plane.links
        self.to_postgres = stack.enter_context(Link(plane.postgres_address))
        self.to_listen = stack.enter_context(
            Link(("127.0.0.1", self.to_postgres.port), is_listener)
        )
        self.to_redis = stack.enter_context(Link(("127.0.0.1", plane.valkey.port)))
        url = Secret(in_clear(through(plane.url, self.to_listen.port)))
        config = Control.model_validate({"database_url": url, **control})
        vault = Vault(plane.secret)
        self.skew = 0.0  # seconds that its wall clock is ahead
        self.store = Store(config, vault)
        self.redis = Redis(
            RedisConfig(url=Secret(through(plane.valkey.url, self.to_redis.port)))
        )
        cache = TenantCache(self.redis, vault, wall=lambda: time.time() + self.skew)
        self.heard = asyncio.Event()  # set while it hears the channel
        self.redis.on_heard.append(self._heard)
        self.directory = Directory(self.store, config, cache=cache)
        #: What subscribers were told, with the time of it.
        self.told: asyncio.Queue[tuple[float, Tenant | None]] = asyncio.Queue()
        self.directory.subscribe(
            lambda _, new: self.told.put_nowait((time.monotonic(), new))
        )

    def _heard(self, is_heard: bool) -> None:
        self.heard.set() if is_heard else self.heard.clear()

    async def start(self) -> None:
        await self.store.open()
        await self.redis.start()
        await self.directory.start()
        await self.heard.wait()

    async def stop(self) -> None:
        await self.directory.stop()
        await self.redis.stop()
        await self.store.close()

    async def next(self) -> Tenant | None:
        """Wait for a change; what became of the tenant."""
        async with asyncio.timeout(PATIENCE):
            _, new = await self.told.get()
        return new

    @property
    def lookups(self) -> dict[str, float]:
        """How many lookups each of the sources has answered."""
        return {
            sample.labels["from"]: sample.value
            for sample in self.directory.samples()
            if sample.labels
        }


class Plane:
    """A control plane of the test's own, and the processes that know it."""

    def __init__(
        self, postgres: Postgres, valkey: Valkey, links: contextlib.ExitStack
    ) -> None:
        self.postgres = postgres
        self.url = postgres.dsn(postgres.create_database())
        self.postgres_address = (postgres.host, postgres.port)
        self.valkey = valkey
        self.links = links
        self.secret = Secret(secrets.token_urlsafe(24))
        self.handle = f"org_{uuid4().hex[:12]}"
        self.client = Client.from_url(valkey.url)
        links.callback(self.client.close)

    async def populate(self, handle: str | None = None) -> str:
        """Make an organisation with a database."""
        handle = handle or self.handle
        control = Control(database_url=Secret(self.url))
        async with Store(control, Vault(self.secret)) as store:
            await store.migrate()
            await store.create_organization(handle, name=handle, tier="free", actor=ME)
            await store.create_database(
                handle, "app", DatabaseType.POSTGRES, Secret(DSN), actor=ME
            )
        return handle

    async def sql(self, statement: LiteralString) -> float:
        """Run and commit a statement; return when that was, or will soon be, done."""
        async with await psycopg.AsyncConnection.connect(
            self.url, autocommit=True
        ) as connection:
            before = time.monotonic()
            await connection.execute(statement, [self.handle])
        return before

    async def suspend(self) -> float:
        return await self.sql(
            "UPDATE platform.organizations SET status = 'suspended' WHERE handle = %s"
        )

    async def delete(self) -> float:
        return await self.sql("DELETE FROM platform.organizations WHERE handle = %s")

    def sealed(self) -> bytes:
        """What Redis holds of the organisation."""
        value = self.client.get(keys.tier(self.handle))
        assert isinstance(value, bytes)
        return value

    def version(self) -> int | None:
        """The version that Redis holds, None for none."""
        value = self.client.get(keys.tier(self.handle))
        assert value is None or isinstance(value, bytes)
        entry = (
            None if value is None else unseal(Vault(self.secret), self.handle, value)
        )
        return None if entry is None else entry.version

    @asynccontextmanager
    async def processes(
        self, count: int, **control: float
    ) -> AsyncIterator[list[Process]]:
        """Start as many processes."""
        async with AsyncExitStack() as stack:
            made = [Process(self, **control) for _ in range(count)]
            for each in made:
                stack.push_async_callback(each.stop)
                await each.start()
            yield made


@pytest.fixture
def plane(postgres: Postgres, own_valkey: Valkey) -> Iterator[Plane]:
    with contextlib.ExitStack() as links:
        yield Plane(postgres, own_valkey, links)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process causes and nobody announces."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.005)


async def test_what_one_process_read_another_finds_in_redis(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        read = await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
        found = await two.directory.find(plane.handle)
        assert found == read and found is not None
        assert found.databases["app"].dsn.get_secret_value() == DSN
        assert one.lookups == {"memory": 0, "redis": 0, "postgres": 1}
        assert two.lookups == {"memory": 0, "redis": 1, "postgres": 0}
        assert await two.directory.find(plane.handle) is found
        assert two.lookups["memory"] == 1


async def test_a_record_is_kept_for_an_hour_and_tells_nothing_to_others(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        read = await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
    assert read is not None
    ttl = plane.client.ttl(keys.tier(plane.handle))
    assert isinstance(ttl, int) and 3590 <= ttl <= 3600
    sealed = plane.sealed()
    for secret in (b"password", plane.handle.encode(), read.salt, b"10.0.0.1"):
        assert secret not in sealed
    assert unseal(Vault(Secret("another passphrase")), plane.handle, sealed) is None


async def test_an_unknown_organisation_leaves_nothing_in_redis(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        assert await one.directory.find("org_nobody") is None
        assert await one.directory.find(plane.handle) is not None
        await until(lambda: plane.version() is not None)
    assert plane.client.keys("tier:*") == [keys.tier(plane.handle).encode()]


@pytest.mark.parametrize(
    "value", [b"", b"nonsense", b"99 r gAAAAnonsense", b"x" * 100, b"1 r \xff"]
)
async def test_what_can_not_be_read_is_as_good_as_nothing(
    plane: Plane, value: bytes
) -> None:
    await plane.populate()
    plane.client.set(keys.tier(plane.handle), value)
    async with plane.processes(1) as (one,):
        assert await one.directory.find(plane.handle) is not None
        assert one.lookups["postgres"] == 1


async def test_a_record_of_one_organisation_is_none_of_another(plane: Plane) -> None:
    await plane.populate()
    other = await plane.populate("org_other")
    async with plane.processes(2) as (one, two):
        await one.directory.find(other)
        await until(lambda: plane.client.exists(keys.tier(other)) == 1)
        stolen = plane.client.get(keys.tier(other))
        assert isinstance(stolen, bytes)
        plane.client.set(keys.tier(plane.handle), stolen)
        found = await two.directory.find(plane.handle)
        assert found is not None and found.handle == plane.handle


async def test_a_stale_record_serves_until_the_store_was_asked(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
    stale = plane.sealed()
    await plane.suspend()
    async with plane.processes(1) as (two,):
        # Held back, so that what was found can be seen before it is compared.
        await until(lambda: not two.directory.is_degraded)
        two.to_postgres.stall()
        found = await two.directory.find(plane.handle)
        assert found is not None and not found.is_suspended
        assert plane.sealed() == stale
        since = time.monotonic()
        two.to_postgres.mend()
        told = await two.next()
        assert told is not None and told.is_suspended
        assert time.monotonic() - since < PROMPT
        await until(lambda: plane.version() == told.version)


async def test_a_process_that_can_not_listen_learns_of_changes_from_the_others(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        two.to_listen.cut()
        await until(lambda: two.directory.is_degraded)
        since = await plane.suspend()
        told = await two.next()
        assert told is not None and told.is_suspended
        assert time.monotonic() - since < PROMPT


async def test_a_process_whose_listening_is_silent_learns_of_changes_all_the_same(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        two.to_listen.stall()
        since = await plane.suspend()
        told = await two.next()
        assert told is not None and told.is_suspended
        assert time.monotonic() - since < PROMPT
        assert not two.directory.is_degraded


async def test_a_process_without_postgres_takes_changes_from_redis(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        two.to_postgres.cut()
        await until(lambda: two.directory.is_degraded)
        since = await plane.suspend()
        told = await two.next()
        assert told is not None and told.is_suspended
        assert time.monotonic() - since < PROMPT


async def test_a_process_without_postgres_learns_of_a_deletion(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        two.to_postgres.cut()
        await until(lambda: two.directory.is_degraded)
        since = await plane.delete()
        assert await two.next() is None
        assert time.monotonic() - since < PROMPT
        assert two.directory.peek(plane.handle) is None


async def test_changes_arrive_without_redis_as_they_did_before(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        plane.valkey.kill()
        since = await plane.suspend()
        for each in (one, two):
            told = await each.next()
            assert told is not None and told.is_suspended
        assert time.monotonic() - since < PROMPT


async def test_a_redis_that_comes_back_empty_is_filled_and_heard_again(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
            each.directory.hold(plane.handle)
        plane.valkey.kill()
        await until(lambda: not one.heard.is_set() and not two.heard.is_set())
        await plane.suspend()
        for each in (one, two):
            told = await each.next()
            assert told is not None and told.is_suspended
        plane.valkey.start()
        await until(lambda: plane.version() is not None)
        assert plane.version() == told.version
        await two.heard.wait()
        two.to_postgres.cut()
        await until(lambda: two.directory.is_degraded)
        since = await plane.sql(
            "UPDATE platform.organizations SET status = 'active' WHERE handle = %s"
        )
        told = await two.next()
        assert told is not None and not told.is_suspended
        assert time.monotonic() - since < PROMPT


async def test_what_was_said_while_redis_was_cut_is_found_when_it_is_back(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        two.to_postgres.cut()
        two.to_redis.cut()
        await until(lambda: two.directory.is_degraded and not two.heard.is_set())
        await plane.suspend()
        told = await one.next()
        assert told is not None
        await until(lambda: plane.version() == told.version)
        two.to_redis.mend()
        told = await two.next()
        assert told is not None and told.is_suspended


async def test_a_fresh_process_without_postgres_serves_whom_redis_knows(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
    two = Process(plane)
    two.to_postgres.cut()
    await two.start()
    try:
        found = await two.directory.find(plane.handle)
        assert found is not None and two.lookups["redis"] == 1
        assert two.directory.is_degraded
        with pytest.raises(ControlUnavailable):
            await two.directory.find("org_b")
        await plane.suspend()
        two.to_postgres.mend()
        told = await two.next()
        assert told is not None and told.is_suspended
        await until(lambda: not two.directory.is_degraded)
    finally:
        await two.stop()


async def test_without_postgres_a_record_serves_no_longer_than_it_may(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
    two = Process(plane, stale_ttl=100.0)
    two.to_postgres.cut()
    two.skew = 101.0
    await two.start()
    try:
        with pytest.raises(ControlUnavailable):
            await two.directory.find(plane.handle)
        two.skew = 90.0
        assert await two.directory.find(plane.handle) is not None
    finally:
        await two.stop()


async def test_a_deleted_organisation_is_not_brought_back_by_who_is_late(
    plane: Plane,
) -> None:
    await plane.populate()
    async with plane.processes(2) as (one, two):
        for each in (one, two):
            await each.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
        late = plane.sealed()
        await plane.delete()
        for each in (one, two):
            assert await each.next() is None
        await until(lambda: plane.sealed() != late)
        gone = plane.sealed()
        version, _, token = late.partition(b" ")
        newer = b"%d %b" % (int(version) + 1, token)
        for record in (late, newer):
            await one.redis.run(
                one.directory._cache._script,  # type: ignore[union-attr]
                [
                    (
                        (keys.tier(plane.handle),),
                        (record.decode(), 3600, keys.CHANGES, plane.handle),
                    )
                ],
            )
            assert plane.sealed() == gone
        ttl = plane.client.ttl(keys.tier(plane.handle))
        assert isinstance(ttl, int) and 0 < ttl <= 60
        # One of that name who comes later is another, and is found.
        await plane.populate()
        again = await two.directory.find(plane.handle)
        assert again is not None


async def test_a_redis_that_gives_no_answer_delays_one_login_only(
    plane: Plane,
) -> None:
    await plane.populate()
    others = [await plane.populate(f"org_other{number}") for number in range(3)]
    async with plane.processes(1) as (one,):
        one.to_redis.stall()
        assert await one.directory.find(plane.handle) is not None
        since = time.monotonic()
        for handle in others:
            assert await one.directory.find(handle) is not None
        assert time.monotonic() - since < PROMPT / 2
        one.to_redis.mend()
