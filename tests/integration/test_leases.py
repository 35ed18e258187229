"""Leases: never over the limit, whatever happens to hosts, Redis and the network."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
import redis

from ogelproxy.config import Limits, Secret
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.hosts import REGISTER
from ogelproxy.limiter import Limiter, TokenBucket
from ogelproxy.redis import Redis
from ogelproxy.tenants.model import Tenant, Tier
from tests.fixtures.leases import (
    SCRIPT,
    TRIP,
    Fleet,
    Lender,
    poisson,
    pulsed,
    spiky,
    worst_excess,
)
from tests.fixtures.redis import Valkey

#: What sums of fractions may add, in tokens.
ROUNDING = 1e-6

SECONDS = 12.0
LOADS = (poisson, pulsed, spiky)


@pytest.fixture(scope="module")
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    made = redis.Redis.from_url(valkey.url)
    yield made
    made.close()


def excess_of(client: redis.Redis, seed: int, script: str = SCRIPT) -> float:
    """Run hosts, loads and faults that the seed picks; return the worst excess."""
    chance = random.Random(seed)
    rate = chance.choice([5.0, 10.0, 50.0, 200.0, 1000.0])
    capacity = chance.choice([rate, rate, 5 * rate, max(rate / 4, 5.0)])
    lender = Lender(client, script, name=f"org_{seed}")
    lender.trip = chance.choice([TRIP, TRIP, 0.005, 0.1])
    fleet = Fleet(
        lender,
        hosts=chance.choice([1, 2, 4, 6]),
        rate=rate,
        capacity=capacity,
        max_wait=chance.choice([0.0, 0.1, 1.0]),
        loss=chance.choice([0.0, 0.0, 0.1, 0.3]),
        seed=seed,
    )
    for host in fleet.hosts:
        load = chance.choice(LOADS)
        share = chance.choice([0.1, 0.3, 1, 2, 4]) / len(fleet.hosts)
        fleet.load(host, load(rate * share, SECONDS, chance))
    for _ in range(chance.randint(0, 4)):
        fleet.happen(chance, SECONDS)
    fleet.run(SECONDS)
    lender.forget()
    return worst_excess(fleet.admitted, rate, capacity)


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_no_window_ever_admits_more_than_the_limit(
    client: redis.Redis, seed: int
) -> None:
    assert max(excess_of(client, seed + each) for each in range(20)) <= ROUNDING


def burst(fleet: Fleet, when: float) -> None:
    """Have more queries come at once, to all hosts, than there can be tokens."""
    for host in fleet.hosts:
        fleet.load(host, itertools.repeat(when, 300))


def forgetting(fleet: Fleet) -> None:
    burst(fleet, 1.0)
    fleet.at(1.05, fleet.lender.lose_everything)
    burst(fleet, 1.4)


def holding(fleet: Fleet) -> None:
    # Each holds a chunk that it doesn't need, for nearly as long as it may.
    for host in fleet.hosts:
        fleet.load(host, iter([1.0]))
    burst(fleet, 1.9)


def trickling(fleet: Fleet) -> None:
    for host in fleet.hosts:
        fleet.load(host, poisson(150, 5, fleet.chance))


def dropping(fleet: Fleet) -> None:
    trickling(fleet)
    for turn in range(50):
        for host in fleet.hosts:
            fleet.at(turn / 10, host.drop)


#: What the script must not do without: how to take it away, and when that shows.
CONTROLS = {
    "the wait for leases of before a restart": (
        ("not kept.run and now > since + ttl * LONGER", "true"),
        forgetting,
    ),
    "the count of what is in hands": (
        (
            "math.min(capacity - out, level + minted)",
            "math.min(capacity, level + minted)",
        ),
        holding,
    ),
    "the time that hosts keep leases": (
        ("local LONGER = 1.1", "local LONGER = 0.5"),
        holding,
    ),
    "the doubt about trickles of before": (
        ("if trickle < 0 then", "if false then"),
        dropping,
    ),
    "the count of what a trickle minted": (
        ("math.min(me.unminted, mintable - minted)", "mintable"),
        trickling,
    ),
}


@pytest.mark.parametrize("missing", CONTROLS)
def test_a_script_without_one_of_its_rules_is_seen_to_go_over(
    client: redis.Redis, missing: str
) -> None:
    (old, new), load = CONTROLS[missing]
    assert old in SCRIPT
    for script, is_over in (SCRIPT, False), (SCRIPT.replace(old, new), True):
        fleet = Fleet(Lender(client, script), hosts=2, rate=100.0, capacity=100.0)
        load(fleet)
        fleet.run(5)
        assert (worst_excess(fleet.admitted, 100, 100) > 10) is is_over


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("rate", [10.0, 50.0, 200.0, 1000.0])
def test_nearly_all_of_the_allowance_can_be_used_at_few_questions(
    client: redis.Redis, rate: float, hosts: int
) -> None:
    lender = Lender(client)
    fleet = Fleet(lender, hosts=hosts, rate=rate, capacity=rate, max_wait=0.1)
    for host in fleet.hosts:
        fleet.load(host, poisson(2 * rate / hosts, 20, fleet.chance))
    fleet.run(20)
    assert len(fleet.admitted) >= 0.95 * (rate + rate * 20)
    assert lender.calls <= 60 * 20


def test_a_host_that_nobody_asks_of_gives_back_what_it_holds(
    client: redis.Redis,
) -> None:
    lender = Lender(client)
    fleet = Fleet(lender, hosts=2, rate=100.0, capacity=100.0)
    fleet.load(fleet.hosts[0], iter([1.0]))
    # All that there is, once the first has given back what it took too much.
    fleet.load(fleet.hosts[1], itertools.repeat(3.0, 300))
    fleet.run(4)
    assert len([when for when in fleet.admitted if when >= 3.0]) == 100


# The limiter itself, on a Valkey of its own.

TIER = Tier("test", 5, 100.0, 1, False, 0, 5, 10, None, None, 1)


def tenant(**changes: float) -> Tenant:
    tier = replace(TIER, **changes)  # type: ignore[arg-type]
    handle = f"org_{uuid4().hex[:12]}"
    return Tenant(UUID(int=1), handle, "A", tier, False, 1, salt=b"salt")


class Taker:
    """A client of a bucket with one query after the other."""

    def __init__(self, bucket: TokenBucket, admitted: list[float]) -> None:
        self.bucket = bucket
        self.admitted = admitted
        self._answer: asyncio.Future[bool] | None = None

    async def take(self) -> bool:
        """Wait for a token, or to be refused."""
        while True:
            now = time.monotonic()
            wait = self.bucket.take(now, 1)
            if wait == 0:
                self.admitted.append(now)
                return True
            if not self.bucket.must_ask and wait > self.bucket.max_wait:
                return False
            self._answer = asyncio.get_running_loop().create_future()
            self.bucket.join(self, 1, now)
            if await self._answer:
                return True

    def grant(self, count: int) -> None:
        assert self._answer is not None
        self.admitted.append(time.monotonic())
        self._answer.set_result(True)

    def retry(self) -> None:
        assert self._answer is not None
        self.bucket.leave(self)
        self._answer.set_result(False)

    def wait_until(self, now: float) -> float:
        return now + self.bucket.max_wait


async def storm(buckets: list[TokenBucket], seconds: float) -> list[float]:
    """Take from all buckets as fast as goes; return when tokens were had."""
    admitted: list[float] = []
    end = time.monotonic() + seconds

    async def run(bucket: TokenBucket) -> None:
        taker = Taker(bucket, admitted)
        while time.monotonic() < end:
            if not await taker.take():
                await asyncio.sleep(0.001)

    await asyncio.gather(*(run(bucket) for bucket in buckets for _ in range(3)))
    return sorted(admitted)


Start = Callable[..., "asyncio.Future[Limiter]"]


@pytest.fixture
async def limiters(own_valkey: Valkey) -> AsyncIterator[Callable[..., object]]:
    """Make limiters that share a Valkey; ``is_new`` tells them that it is new."""
    async with AsyncExitStack() as parts:

        async def start(*, is_new: bool = True, **settings: float) -> Limiter:
            config = RedisConfig(url=Secret(own_valkey.url), timeout=0.3)
            shared = Redis(config)
            await shared.start()
            parts.push_async_callback(shared.stop)
            if is_new:
                await shared.declare_new()
            limits = Limits.model_validate(settings)
            limiter = Limiter(limits, time.monotonic, shared)
            await limiter.start()
            parts.push_async_callback(limiter.stop)
            return limiter

        yield start


async def test_limiters_share_one_limit(limiters: Callable[..., object]) -> None:
    shared = [await limiters(floor=0) for _ in range(3)]  # type: ignore[misc]
    who = tenant()
    began = time.monotonic()
    admitted = await storm([limiter.bucket(who) for limiter in shared], 3)
    took = time.monotonic() - began
    assert worst_excess(admitted, 100, 100) <= ROUNDING
    assert len(admitted) >= 0.9 * (100 + 100 * took)


async def test_a_burst_finds_the_whole_bucket(limiters: Callable[..., object]) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    bucket = limiter.bucket(tenant(max_queries_per_second=1))
    bucket.configure(1, 50, time.monotonic())
    admitted: list[float] = []
    takers = [Taker(bucket, admitted) for _ in range(80)]
    had = await asyncio.gather(*(taker.take() for taker in takers))
    assert sum(had) == 50


async def test_those_who_wait_are_served_in_order(
    limiters: Callable[..., object],
) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    bucket = limiter.bucket(tenant(max_queries_per_second=20))
    bucket.max_wait = 5.0
    order: list[int] = []

    async def one(number: int) -> None:
        assert await Taker(bucket, []).take()
        order.append(number)

    await asyncio.gather(*map(one, range(40)))
    assert order == sorted(order)


async def test_without_redis_the_floor_is_left_and_no_more(
    limiters: Callable[..., object], own_valkey: Valkey
) -> None:
    shared = [
        await limiters(floor=0.5, max_hosts=2)  # type: ignore[misc]
        for _ in range(2)
    ]
    who = tenant()
    buckets = [limiter.bucket(who) for limiter in shared]
    settled = max(limiter._host.since for limiter in shared)
    await asyncio.sleep(settled - time.monotonic())
    before = await storm(buckets, 0.5)
    own_valkey.freeze()
    away = await storm(buckets, 3)
    own_valkey.thaw()
    after = await storm(buckets, 2)
    assert worst_excess([*before, *away, *after], 100, 100) <= ROUNDING
    # A half of the rate is left, once the timeout told them so.
    lasting = [when for when in away if when > away[-1] - 1.5]
    assert 0.7 * 75 <= len(lasting) <= 75 + 50
    assert len([when for when in after if when > after[-1] - 1]) >= 80


async def test_without_redis_and_floor_nothing_passes(
    limiters: Callable[..., object], own_valkey: Valkey
) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    bucket = limiter.bucket(tenant())
    await storm([bucket], 0.3)
    own_valkey.kill()
    admitted = await storm([bucket], 2.5)
    assert not [when for when in admitted if when > admitted[0] + 1.0]
    assert not await Taker(bucket, []).take()


async def test_a_redis_that_comes_back_empty_grants_nothing_twice(
    limiters: Callable[..., object], own_valkey: Valkey
) -> None:
    shared = [await limiters(floor=0) for _ in range(2)]  # type: ignore[misc]
    who = tenant()
    buckets = [limiter.bucket(who) for limiter in shared]
    running = asyncio.create_task(storm(buckets, 5))
    for _ in range(2):
        await asyncio.sleep(1.0)
        own_valkey.kill()
        await asyncio.to_thread(own_valkey.start)
    admitted = await running
    assert worst_excess(admitted, 100, 100) <= ROUNDING
    assert len([when for when in admitted if when > admitted[-1] - 1]) >= 80


async def test_a_broken_key_of_one_organisation_stops_no_other(
    limiters: Callable[..., object], own_valkey: Valkey
) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    broken, sound = tenant(), tenant()
    with redis.Redis.from_url(own_valkey.url) as client:
        client.set(f"ratelimit:{broken.handle}", "not a hash")
    first, second = limiter.bucket(broken), limiter.bucket(sound)
    had = await asyncio.gather(Taker(first, []).take(), Taker(second, []).take())
    assert had == [False, True]


async def test_a_higher_limit_is_used_at_once(limiters: Callable[..., object]) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    who = tenant(max_queries_per_second=5)
    bucket = limiter.bucket(who)
    await storm([bucket], 0.5)
    limiter.update(
        replace(who, version=2, tier=replace(TIER, max_queries_per_second=500.0))
    )
    admitted = await storm([bucket], 1.5)
    assert len(admitted) >= 300


async def test_who_waits_too_long_is_sent_back_when_the_limit_falls(
    limiters: Callable[..., object],
) -> None:
    limiter = await limiters(floor=0)  # type: ignore[misc]
    who = tenant(max_queries_per_second=50)
    bucket = limiter.bucket(who)
    bucket.max_wait = 2.0
    admitted: list[float] = []
    takers = [
        asyncio.create_task(Taker(bucket, admitted).take()) for _ in range(50 + 60)
    ]
    await asyncio.sleep(0.3)
    slower = replace(TIER, max_queries_per_second=2.0)
    limiter.update(replace(who, version=2, tier=slower, max_wait=2.0))
    had = await asyncio.wait_for(asyncio.gather(*takers), 5)
    assert 50 < sum(had) < 50 + 40
    assert not bucket.queue


def test_hosts_are_told_apart_by_their_numbers(client: redis.Redis) -> None:
    """A number is one host's until it lets go or is silent for long."""
    key = f"hosts:{uuid4().hex}"
    register = client.register_script(REGISTER.text)
    minute = 60_000_000
    client.hset(key, "complete", client.info("server")["run_id"])

    def ask(name: str, had: int = -1, keep: int = minute) -> int:
        arguments = [name, had, 2, keep, 600_000_000]
        return int(register(keys=[key, f"{key}:epoch"], args=arguments))

    assert [ask("a"), ask("b"), ask("c")] == [0, 1, -1]
    assert [ask("a", 0), ask("b", 1)] == [0, 1]
    assert ask("a", 0, keep=1) == 0
    time.sleep(0.01)
    assert ask("c") == 0
    assert ask("a", 0) == -1
    client.delete(key, f"{key}:epoch")
    # Redis lost its memory: who has a number keeps it, nobody gets another.
    assert [ask("b", 1), ask("d"), ask("a", -1)] == [1, -1, -1]
    client.delete(key)


def test_the_worst_excess_is_that_of_the_worst_window() -> None:
    times = [0.0] * 11 + [0.5] * 5
    assert worst_excess(times, 10, 10) == pytest.approx(1.0)
    assert worst_excess([0.0, 1.0, 2.0], 1, 1) == pytest.approx(0.0)
    assert math.isinf(worst_excess([], 1, 1))
