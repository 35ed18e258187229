"""One host of a limiter trial: a real Limiter under load, in a process of its own.

    python -m bench.host

Reads its part of the trial (`HostSpec`) as a line of JSON, says `READY`, and reads a
line with the time at which the trial begins. Then it lets the queries of each load
arrive at the bucket as the relay lets them, and writes every admission to a file as
it happens, by one write(2) each: with a killed process at most one is lost. At the
end it says what it asked of Redis (`HostReport`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from bench import controls
from bench.loads import LOADS, TICK, Place
from ogelproxy import keys
from ogelproxy.config import Limits, Secret
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.limiter import Limiter, TokenBucket
from ogelproxy.redis import Call, Redis, Script
from ogelproxy.tenants.model import Tenant, Tier

READY = b"ready\n"
#: One admission: when by CLOCK_MONOTONIC, and of which of the spec's tenants.
ADMISSION = struct.Struct("<dI")


@dataclass(frozen=True, slots=True)
class TenantSpec:
    """One organisation, its limit and its load."""

    handle: str
    rate: float  # tokens per second
    may_burst: bool  # whether its bucket holds five seconds of it, or one
    max_wait: float  # seconds
    load: str  # a name of `loads.LOADS`

    @property
    def tenant(self) -> Tenant:
        tier = Tier(
            "bench", 100, self.rate, 1, self.may_burst, 0, 0, 0, None, None, None
        )
        return Tenant(
            UUID(int=0), self.handle, self.handle, tier, False, 1, b"",
            max_wait=self.max_wait,
        )  # fmt: skip

    @property
    def capacity(self) -> float:
        """Tokens that its bucket holds."""
        return self.tenant.tier.bucket_capacity


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What one host does."""

    tenants: Sequence[TenantSpec]
    host: int  # from 0
    hosts: int
    redis_url: str | None
    seconds: float
    admissions: str  # path of the file
    floor: float  # share of each limit that needs no Redis
    control: str | None  # a name of `controls.CONTROLS`

    @classmethod
    def read(cls, text: bytes) -> HostSpec:
        values: dict[str, Any] = orjson.loads(text)
        values["tenants"] = [TenantSpec(**each) for each in values["tenants"]]
        return cls(**values)


@dataclass(slots=True)
class HostReport:
    """What one host saw."""

    #: Calls of the lease script, by organisation.
    calls: dict[str, int] = field(default_factory=dict)
    #: Queries that came, by organisation.
    arrived: dict[str, int] = field(default_factory=dict)


class CountingRedis(Redis):
    """A Redis that counts the calls of scripts by their first key."""

    def __init__(self, config: RedisConfig) -> None:
        super().__init__(config)
        self.calls: Counter[str] = Counter()

    async def run_each(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        self.calls.update(keys[0] for keys, _ in calls)
        return await super().run_each(script, calls)


class Clock:
    """CLOCK_MONOTONIC, and what it said last: the time at which a bucket granted."""

    def __init__(self) -> None:
        self.latest = time.monotonic()

    def __call__(self) -> float:
        self.latest = time.monotonic()
        return self.latest


class Stream:
    """One organisation's queries at this host."""

    def __init__(
        self,
        number: int,
        bucket: TokenBucket,
        clock: Clock,
        arrivals: Iterator[tuple[float, int]],
        log: int,
    ) -> None:
        self.bucket = bucket
        self.clock = clock
        self.arrived = 0
        self._number = number  # of the organisation in the spec
        self._arrivals = arrivals
        self._following = next(arrivals, None)
        self._log = log  # descriptor that admissions are written to

    def skip(self, end: float) -> None:
        """Leave out what should have come before `end`, seconds since the begin."""
        while self._following is not None and self._following[0] < end:
            self._following = next(self._arrivals, None)

    def send(self, end: float) -> None:
        """Let all that is due by `end` arrive."""
        while self._following is not None and self._following[0] <= end:
            for _ in range(self._following[1]):
                self.arrived += 1
                Query(self).pay()
            self._following = next(self._arrivals, None)

    def admit(self) -> None:
        """Note that the bucket let one pass, at the time that it was told."""
        os.write(self._log, ADMISSION.pack(self.clock.latest, self._number))


class Query:
    """A query at the bucket; does what a client's `pay` does (`_client.pyx`)."""

    __slots__ = ("_since", "_stream", "_timer")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._since = 0.0  # when its wait for tokens began, if it did
        self._timer: asyncio.TimerHandle | None = None  # ends the wait

    def pay(self) -> None:
        """Take a token, or wait for one, or be refused."""
        self._timer = None
        bucket = self._stream.bucket
        now = self._stream.clock()
        wait = bucket.take(now, 1)
        if wait == 0:
            self._stream.admit()
        elif bucket.must_ask:
            bucket.join(self, 1, now)
        elif now + wait <= (end := self.wait_until(now)):
            self._since = self._since or now
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(end - now, self._give_up)
            bucket.join(self, 1, now)

    def _give_up(self) -> None:
        self._stream.bucket.leave(self)

    # What a bucket asks of those in its queue.

    def wait_until(self, now: float) -> float:
        return (self._since or now) + self._stream.bucket.max_wait

    def grant(self, count: int) -> None:
        self._end_wait()
        self._stream.admit()

    def retry(self) -> None:
        self._end_wait()
        self.pay()

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def run(spec: HostSpec) -> HostReport:
    """Be the host until the trial ends."""
    redis = None
    if spec.redis_url is not None:
        redis = CountingRedis(RedisConfig(url=Secret(spec.redis_url)))
        await redis.start()
    clock = Clock()
    limiter = Limiter(Limits(floor=spec.floor), clock, redis)
    await limiter.start()
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    begin = float(await asyncio.to_thread(sys.stdin.buffer.readline))
    log = os.open(spec.admissions, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    streams = []
    for number, each in enumerate(spec.tenants):
        place = Place(each.rate, each.capacity, spec.host, spec.hosts, spec.seconds)
        bucket = limiter.bucket(each.tenant)
        streams.append(Stream(number, bucket, clock, LOADS[each.load](place), log))
        # What should have come before this process is not sent.
        streams[-1].skip(clock() - begin)
    while (since := clock() - begin) < spec.seconds:
        for stream in streams:
            stream.send(since)
        await asyncio.sleep(TICK)
    report = HostReport()
    for each, stream in zip(spec.tenants, streams, strict=True):
        report.arrived[each.handle] = stream.arrived
        if redis is not None:
            report.calls[each.handle] = redis.calls[keys.ratelimit(each.handle)]
    return report


def admissions(path: Path) -> Iterator[tuple[float, int]]:
    """Read what hosts wrote: times and numbers of organisations."""
    content = path.read_bytes()
    whole = len(content) - len(content) % ADMISSION.size
    yield from ADMISSION.iter_unpack(content[:whole])


def main() -> None:
    spec = HostSpec.read(sys.stdin.buffer.readline())
    # That Redis is away is what a trial does; nobody has to read of it.
    logging.getLogger("ogelproxy").addHandler(logging.NullHandler())
    if spec.control is not None:
        controls.CONTROLS[spec.control]()
    with asyncio.Runner() as runner:
        report = runner.run(run(spec))
        sys.stdout.buffer.write(orjson.dumps(asdict(report)))
        sys.stdout.flush()
        # A host may end at any time; what it has under way is awaited by nobody.
        os._exit(0)


if __name__ == "__main__":
    main()
