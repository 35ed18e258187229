"""Slots of connections over several hosts that meet in a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from ogelproxy import keys, slots
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.config import Secret
from ogelproxy.errors import OgelError, RedisUnavailable, TooManyConnections
from ogelproxy.redis import Redis
from ogelproxy.slots import Slots
from tests.fixtures.link import Link
from tests.fixtures.redis import Valkey

#: Seconds in which anything that should happen has happened.
PATIENCE = 10.0


class Host:
    """A machine: its slots, and the connections of one organisation that have them."""

    def __init__(
        self, url: str, handle: str, *, is_strict: bool = False, timeout: float = 1.0
    ) -> None:
        self.handle = handle
        self.redis = Redis(RedisConfig(url=Secret(url), timeout=timeout))
        self.slots: Slots[object] = Slots(
            self.redis, is_strict=is_strict, on_lost=self._lose
        )
        self.open: list[object] = []  # the newest is last
        self.lost: list[OgelError] = []
        self._moved = asyncio.Event()

    def _lose(self, holder: object, error: OgelError) -> None:
        assert holder == self.open.pop(), "not the newest"
        self.lost.append(error)
        self._moved.set()

    async def take(self, maximum: int, version: int = 1) -> int | None:
        """Open a connection if there is a slot; see `Slots.take`."""
        holder = object()
        refused = await self.slots.take(self.handle, holder, maximum, version)
        if refused is None:
            self.open.append(holder)
        return refused

    def give(self) -> None:
        """Close the newest connection."""
        self.slots.give(self.handle, self.open.pop())

    async def fill(self, maximum: int) -> int:
        """Open connections until there is no room; return how many."""
        count = 0
        while await self.take(maximum) is None:
            count += 1
        return count

    async def until_taken(self, maximum: int) -> None:
        """Open a connection as soon as there is a slot and a Redis."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(RedisUnavailable):
                    if await self.take(maximum) is None:
                        return
                await asyncio.sleep(0.005)  # a client's pause

    async def until_lost(self, count: int) -> None:
        while len(self.lost) < count:
            self._moved.clear()
            async with asyncio.timeout(PATIENCE):
                await self._moved.wait()


MakeHost = Callable[..., Awaitable[Host]]


@pytest.fixture
def handle() -> str:
    return f"org_{uuid4().hex[:12]}"


@pytest_asyncio.fixture
async def hosts(handle: str) -> AsyncIterator[MakeHost]:
    """Start machines: ``await hosts(url)``."""
    made: list[Host] = []

    async def start(url: str, **options: object) -> Host:
        host = Host(url, handle, **options)  # type: ignore[arg-type]
        made.append(host)
        await host.slots.start()
        return host

    yield start
    for host in made:
        await host.slots.stop()
        await host.redis.stop()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of 0.5 s instead of 8."""
    monkeypatch.setattr(slots, "LEASE_TTL", 0.5)
    monkeypatch.setattr(slots, "RENEWAL_INTERVAL", 0.1)
    monkeypatch.setattr(slots, "EXPIRY_INTERVAL", 0.02)


def url_by(link: Link, valkey: Valkey) -> str:
    return valkey.url.replace(f":{valkey.port}/", f":{link.port}/")


async def slow_down(valkey: Valkey, pause: float) -> None:
    """Freeze it most of the time."""
    while True:
        valkey.freeze()
        await asyncio.sleep(pause)
        valkey.thaw()
        await asyncio.sleep(0.01)


async def known(host: Host) -> dict[bytes, int]:
    """What Redis keeps of the organisation: slots by host."""
    fields = await host.redis.command("HGETALL", keys.connections(host.handle))
    return {name: int(value.split()[0]) for name, value in fields.items()}


async def until_known(host: Host, slots: list[int]) -> None:
    """Wait until Redis keeps just so many for the hosts that have any, sorted."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if sorted((await known(host)).values()) == slots:
                return
            await asyncio.sleep(0)


async def test_hosts_share_a_maximum_and_are_told_how_many_there_are(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    assert [await a.take(3), await b.take(3), await a.take(3)] == [None] * 3
    assert [await a.take(3), await b.take(3)] == [3, 3]
    a.give()
    await b.until_taken(3)
    assert (len(a.open), len(b.open)) == (1, 2)
    assert b.slots.total(b.handle) == 3


async def test_of_a_hundred_at_once_exactly_as_many_get_in_as_may(
    valkey: Valkey, hosts: MakeHost
) -> None:
    machines = [await hosts(valkey.url) for _ in range(4)]
    answers = await asyncio.gather(
        *(machines[number % 4].take(37) for number in range(100))
    )
    assert sum(answer is None for answer in answers) == 37
    assert {answer for answer in answers if answer is not None} == {37}


async def test_a_hundred_get_in_where_a_hundred_may(
    valkey: Valkey, hosts: MakeHost
) -> None:
    machines = [await hosts(valkey.url) for _ in range(4)]
    for _ in range(3):
        answers = await asyncio.gather(
            *(machines[number % 4].take(100) for number in range(100))
        )
        assert answers == [None] * 100
        for machine in machines:
            while machine.open:
                machine.give()
        await until_known(machines[0], [])


async def test_nothing_is_left_of_who_went(valkey: Valkey, hosts: MakeHost) -> None:
    a = await hosts(valkey.url)
    await a.take(5)
    assert list((await known(a)).values()) == [1]
    a.give()
    await until_known(a, [])
    await a.slots.stop()
    assert not a.slots._holdings
    ttl = await a.redis.command("TTL", keys.connections(a.handle))
    assert ttl == -2  # there is no such key


async def test_who_comes_again_soon_needs_no_redis_while_half_is_free(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a = await hosts(valkey.url)
    for _ in range(2):
        assert await a.take(4) is None
    for _ in range(2):
        a.give()
    await asyncio.sleep(5 * slots.RETURN_DELAY)
    assert await known(a) != {}
    valkey.freeze()
    try:
        async with asyncio.timeout(0.2):
            assert [await a.take(4), await a.take(4)] == [None, None]
    finally:
        valkey.thaw()


async def test_what_is_spare_keeps_nobody_out_of_the_other_half(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    for _ in range(5):
        assert await a.take(10) is None
    while a.open:
        a.give()
    assert await b.fill(10) >= 5
    assert a.slots.total(a.handle) <= 10


async def test_slots_go_back_at_once_where_more_than_half_is_taken(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a = await hosts(valkey.url)
    for _ in range(3):
        assert await a.take(5) is None
    while a.open:
        a.give()
    async with asyncio.timeout(slots.SPARE_TTL / 2):
        await until_known(a, [])


async def test_slots_of_who_stops_are_free_at_once(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    assert await a.fill(5) == 5
    while a.open:
        a.give()
    await a.slots.stop()
    assert await b.fill(5) == 5


async def test_who_gives_up_waiting_leaves_its_slot_to_others(
    valkey: Valkey, hosts: MakeHost
) -> None:
    a = await hosts(valkey.url)
    for turns in range(12):
        waiting = asyncio.create_task(a.take(1))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        if a.open:
            a.give()
        assert await a.take(1) is None
        a.give()


async def test_leases_are_renewed_while_there_are_connections(
    valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    await a.fill(3)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert await b.take(3) == 3
        await asyncio.sleep(0.02)
    assert a.slots.unproven_count == 0
    assert not a.lost


async def test_slots_of_a_host_that_died_come_back(
    valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    assert await a.fill(3) == 3
    died = time.monotonic()
    for task in a.slots._tasks:
        task.cancel()
    await b.until_taken(3)
    assert 0.3 < time.monotonic() - died < 0.7  # 0.5 s and a tenth, less a renewal
    assert await b.fill(3) == 2


async def test_who_was_cut_off_too_long_ends_its_newest_that_do_not_fit(
    valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    assert await a.fill(5) == 5
    await a.slots._asking.acquire()  # nothing is asked any more
    await b.until_taken(5)
    assert await b.take(5) is None
    assert a.slots.unproven_count == 5
    a.slots._asking.release()
    await a.until_lost(2)
    assert [error.sqlstate for error in a.lost] == ["53300"] * 2
    assert isinstance(a.lost[0], TooManyConnections)
    assert (len(a.open), len(b.open)) == (3, 2)
    assert await a.take(5) == 5


async def test_what_an_answer_grants_too_late_is_not_used_before_it_is_proven_anew(
    valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    run = a.redis.run
    is_answered, may_go_on = asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any) -> list[Any]:
        answers = await run(*arguments)
        is_answered.set()
        await may_go_on.wait()
        return answers

    a.redis.run = late  # type: ignore[method-assign]
    asked = asyncio.create_task(a.take(1))
    await is_answered.wait()  # a slot was granted, which nobody here knows of
    await b.until_taken(1)  # it was kept for as long as it could be used
    a.redis.run = run  # type: ignore[method-assign]
    may_go_on.set()
    assert await asked == 1
    assert (len(a.open), len(b.open)) == (0, 1)


async def test_without_redis_who_left_may_come_back_while_the_lease_lasts(
    own_valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a = await hosts(own_valkey.url)
    assert await a.fill(3) == 3
    own_valkey.kill()
    leased = time.monotonic()
    a.give()
    assert await a.take(3) is None
    with pytest.raises(RedisUnavailable):
        await a.take(4)
    await asyncio.sleep(leased + 0.6 - time.monotonic())
    assert len(a.open) == 3
    a.give()
    with pytest.raises(RedisUnavailable):
        await a.take(3)
    assert not a.lost


async def test_requests_that_arrive_late_take_nothing_from_anybody(
    valkey: Valkey, hosts: MakeHost
) -> None:
    with Link(("127.0.0.1", valkey.port)) as link:
        a = await hosts(url_by(link, valkey), timeout=0.1)
        b = await hosts(valkey.url)
        assert [await a.take(4), await a.take(4)] == [None, None]
        link.stall()
        with pytest.raises(RedisUnavailable):
            await a.take(4)
        a.give()
        assert await a.take(4) is None  # in the place of the other
        a.give()
        assert [await b.take(4), await b.take(4), await b.take(4)] == [None, None, 4]
        link.mend()
        await b.until_taken(4)  # what was given back
        assert (len(a.open), len(b.open)) == (1, 3)
        assert [await a.take(4), await b.take(4)] == [4, 4]
        while b.open:
            b.give()
        await until_known(b, [1])
        assert await a.fill(4) == 3
        assert not a.lost


async def test_a_slow_redis_admits_as_many_as_a_fast_one(
    own_valkey: Valkey, hosts: MakeHost
) -> None:
    a, b = await hosts(own_valkey.url), await hosts(own_valkey.url)
    slowing = asyncio.create_task(slow_down(own_valkey, 0.2))
    answers = await asyncio.gather(
        *((a, b)[number % 2].take(8) for number in range(20))
    )
    slowing.cancel()
    assert answers.count(None) == 8
    assert {answer for answer in answers if answer is not None} == {8}


async def test_strict_hosts_end_what_they_can_not_prove(
    own_valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a = await hosts(own_valkey.url, is_strict=True)
    assert await a.fill(3) == 3
    own_valkey.kill()
    killed = time.monotonic()
    await a.until_lost(3)
    assert 0.3 < time.monotonic() - killed < 0.55  # before Redis would forget
    assert {type(error) for error in a.lost} == {RedisUnavailable}
    own_valkey.start()
    own_valkey.declare_new()
    await a.until_taken(3)


async def test_a_redis_that_lost_its_memory_admits_nobody_until_all_have_spoken(
    own_valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(own_valkey.url), await hosts(own_valkey.url)
    for host in (a, a, b):
        assert await host.take(4) is None
    own_valkey.restart()
    asked = time.monotonic()
    await b.until_taken(4)
    assert 0.4 < time.monotonic() - asked < 2.0
    assert sorted((await known(b)).values()) == [2, 2]
    assert [await a.take(4), await b.take(4)] == [4, 4]
    assert not a.lost
    assert not b.lost


async def test_a_lowered_maximum_ends_nobody_and_admits_nobody(
    valkey: Valkey, hosts: MakeHost, short: None
) -> None:
    a, b = await hosts(valkey.url), await hosts(valkey.url)
    assert [await a.take(4), await a.take(4), await b.take(4)] == [None] * 3
    assert await b.take(1, version=2) == 3
    assert await a.take(1, version=2) == 3
    assert await a.take(4, version=1) == 3  # a login that began before the change
    a.give()
    assert await a.take(1, version=2) == 2  # nor in the place of who left
    assert await b.take(4, version=3) is None
    await asyncio.sleep(0.3)  # renewals
    assert (len(a.open), len(b.open), a.lost, b.lost) == (1, 2, [], [])
    a.give()
    b.give()
    await until_known(a, [1])
    assert await b.take(1, version=4) == 1
    assert await a.take(2, version=5) is None
