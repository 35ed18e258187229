"""Tenant records in Redis: several directories, one Valkey, one real Postgres."""

from __future__ import annotations

import asyncio
import time

import pytest

from ogelproxy import keys
from ogelproxy.config import Secret
from ogelproxy.errors import ControlUnavailable
from ogelproxy.tenants.seal import unseal
from ogelproxy.tenants.vault import Vault
from tests.fixtures.fleet import DSN, PROMPT, Plane, Process, until


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
        newest = told.version
        await until(lambda: plane.version() == newest)


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
        # More connections than one, each of which is dead when it is used again.
        await asyncio.gather(*(two.redis.command("PING") for _ in range(8)))
        two.to_postgres.cut()
        two.to_redis.cut()
        await until(lambda: two.directory.is_degraded and not two.heard.is_set())
        await plane.suspend()
        told = await one.next()
        assert told is not None
        newest = told.version
        await until(lambda: plane.version() == newest)
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


async def test_an_older_record_takes_no_newer_one_s_place(plane: Plane) -> None:
    await plane.populate()
    async with plane.processes(1) as (one,):
        await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
        late, older = plane.sealed(), plane.version()
        await plane.suspend()
        await one.next()
        await until(lambda: plane.version() != older)
        newer = plane.sealed()
        assert await one.redis.run(*plane.writing(late)) == [0]
        assert plane.sealed() == newer
        assert plane.client.delete(keys.tier(plane.handle)) == 1
        assert await one.redis.run(*plane.writing(newer)) == [1]
        assert await one.redis.run(*plane.writing(newer)) == [0]
        plane.client.expire(keys.tier(plane.handle), 1000)
        # More than half of its time is over: it is kept for another hour.
        assert await one.redis.run(*plane.writing(newer)) == [1]
        ttl = plane.client.ttl(keys.tier(plane.handle))
        assert isinstance(ttl, int) and ttl > 3000


async def test_records_are_written_again_before_they_expire(plane: Plane) -> None:
    await plane.populate()
    # Comparisons take turns over half an hour: one that is so rare writes all.
    async with plane.processes(1, reconcile_interval=3600) as (one,):
        await one.directory.find(plane.handle)
        await until(lambda: plane.version() is not None)
        plane.client.delete(keys.tier(plane.handle))
        # As after a lost connection.
        one.to_listen.cut()
        await until(lambda: one.directory.is_degraded)
        assert plane.version() is None
        one.to_listen.mend()
        await until(lambda: plane.version() is not None)


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
            await one.redis.run(*plane.writing(record))
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
