"""Limiter: whether a query may run. One bucket per organisation, in this process.

Makes the buckets, shapes them after the tenant, leases tokens for them where other
processes share a Redis, and words the refusal; taking tokens and waiting for them
is `TokenBucket`'s. How many connections there may be is `gate`'s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ogelproxy import keys
from ogelproxy._bucket import ENFORCE, OFF, WARN, TokenBucket
from ogelproxy.config import Limits
from ogelproxy.errors import RateLimited, RedisUnavailable
from ogelproxy.hosts import Host
from ogelproxy.redis import Redis, Script
from ogelproxy.tenants.model import LimiterMode, Tenant

__all__ = ["Limiter", "TokenBucket"]

logger = logging.getLogger(__name__)

LEND = Script.read("epoch.lua", "limiter.lua")

#: Seconds that a trickle lasts, thus between questions of a host that is always busy.
TRICKLE_TTL = 0.25
#: Seconds that tokens which were granted at once may be kept.
CHUNK_TTL = 1.0
#: Questions of one pipeline: some 5 ms of Redis's time.
ASKED_AT_ONCE = 64
#: Seconds for which nobody asks again when there was no answer.
AWAY_INTERVAL = 0.5

MODES = {
    LimiterMode.ENFORCE: ENFORCE,
    LimiterMode.WARN: WARN,
    LimiterMode.OFF: OFF,
}

#: Refusals within the interval, in seconds, that make the hint speak of upgrading.
PROMPT_REFUSALS = 5
PROMPT_INTERVAL = 60.0

#: Old buckets looked at for each new one: two, so that the table shrinks.
SWEPT_AT_ONCE = 2


@dataclass(slots=True)
class _Record:
    """What the limiter remembers beside a bucket, and what the bucket asks of it."""

    limiter: Limiter
    handle: str
    version: int  # of the tenant that shaped the bucket
    refusals: int = 0  # since `refused_from`
    refused_from: float = -math.inf  # when the interval of refusals began
    is_asked: bool = False  # a question is waiting to be sent
    #: Sequence number by which the latest trickle was got; a bucket of before may have
    #: had another.
    trickle: int = -1
    waking: asyncio.TimerHandle | None = None  # of the bucket's queue

    def ask(self, bucket: TokenBucket) -> None:
        """Ask the lender for tokens; the bucket is told what came of it."""
        if not self.is_asked:
            self.is_asked = True
            self.limiter.question(self, bucket)

    def rest(self) -> None:
        """Have the bucket look at nothing."""
        if self.waking is not None:
            self.waking.cancel()
            self.waking = None

    def wake(self, bucket: TokenBucket, wait: float) -> None:
        """Have the bucket look at its queue in `wait` seconds."""
        self.rest()
        if math.isfinite(wait):
            loop = self.limiter.loop or asyncio.get_running_loop()
            self.waking = loop.call_later(wait, self._serve, bucket)

    def _serve(self, bucket: TokenBucket) -> None:
        self.waking = None
        bucket.serve(self.limiter.clock())


class Limiter:
    """The buckets of one process, by organisation.

    Without a Redis each mints all that its organisation may use; with one they
    lease it, so that all processes together stay within the limit (docs/limits.md).
    A bucket lives while somebody holds it or, without leases, while it isn't full:
    a new one is born full, so dropping any other would give tokens away.
    """

    def __init__(
        self,
        config: Limits,
        clock: Callable[[], float],
        redis: Redis | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`loop` times the waits; None is the one that runs."""
        self.config = config  # the relay asks it how long transactions may wait
        #: Told of a tenant each time that it is refused, having been so often.
        self.prompted: Callable[[Tenant], None] = lambda tenant: None
        self.clock = clock
        self.loop = loop
        self.ask_count = 0  # questions sent, ever
        self.unanswered_count = 0  # of them, ever
        self._redis = redis
        self._host: Host | None = None
        if redis is not None:
            self._host = Host(redis, config.max_hosts, clock, self._floor_changed)
        self._sequence = 0  # of the latest question
        self._asked: list[tuple[_Record, TokenBucket]] = []  # to be sent this turn
        self._lending: set[asyncio.Task[None]] = set()  # questions on their way
        self._away_until = -math.inf  # by the clock; after a lost question
        # Both have the same keys; the order is that of the last look.
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._records: dict[str, _Record] = {}

    def __len__(self) -> int:
        """Return how many buckets are kept."""
        return len(self._buckets)

    def bucket(self, tenant: Tenant) -> TokenBucket:
        """Return the bucket of all the organisation's connections."""
        bucket = self._buckets.get(tenant.handle)
        if bucket is None:
            self._sweep()
            record = _Record(self, tenant.handle, tenant.version)
            bucket = TokenBucket(
                tenant.tier.max_queries_per_second,
                tenant.tier.bucket_capacity,
                self.clock(),
                record,
                is_leased=self._redis is not None,
            )
            self._buckets[tenant.handle] = bucket
            self._records[tenant.handle] = record
            self._set_floor(bucket)
            if bucket.is_leased and tenant.limiter_mode is not LimiterMode.OFF:
                # So that the first query doesn't have to wait for it.
                record.ask(bucket)
        self._shape(bucket, tenant)
        return bucket

    def peek(self, handle: str) -> TokenBucket | None:
        """Return an organisation's bucket, if there is one."""
        return self._buckets.get(handle)

    async def start(self) -> None:
        """Become one of the hosts of the Redis, where there is one."""
        if self._host is not None:
            await self._host.start()

    async def stop(self) -> None:
        """Leave the other hosts."""
        for record in self._records.values():
            record.rest()
        for task in self._lending:
            task.cancel()
        await asyncio.gather(*self._lending, return_exceptions=True)
        if self._host is not None:
            await self._host.stop()

    def update(self, tenant: Tenant) -> None:
        """Carry a change of tier, mode or `max_wait` to the live bucket at once."""
        bucket = self._buckets.get(tenant.handle)
        if bucket is not None:
            self._shape(bucket, tenant)

    def forget(self, handle: str) -> None:
        """Drop the bucket, if it is full and nobody holds it."""
        if handle in self._buckets:
            self._let_go(handle)

    def refusal(
        self, bucket: TokenBucket, tenant: Tenant | None, wait: float
    ) -> RateLimited:
        """Make the error, or the notice, for a query that met the limit.

        `wait` is what the bucket's `take` returned, of either sign. Without a
        tenant, whose record may have gone meanwhile, no tier is named.
        """
        hint = _advice(bucket, abs(wait))
        detail = f"limit={bucket.rate:.10g}/s"
        if tenant is None:
            return RateLimited(detail=detail, hint=hint)
        if self._is_repeated(tenant.handle):
            hint += "; you meet this limit often: upgrade for a higher one"
            self.prompted(tenant)
        return RateLimited(
            f"{tenant.handle} met its limit of {bucket.rate:.10g}/s",
            detail=f"tier={tenant.tier.name} {detail}",
            hint=hint,
        )

    def _shape(self, bucket: TokenBucket, tenant: Tenant) -> None:
        record = self._records[tenant.handle]
        if tenant.version < record.version:
            return  # a login that began before the change
        is_new = tenant.version > record.version
        record.version = tenant.version
        rate, capacity = tenant.tier.max_queries_per_second, tenant.tier.bucket_capacity
        if (bucket.rate, bucket.capacity) != (rate, capacity):
            bucket.configure(rate, capacity, self.clock())
            self._set_floor(bucket)
        bucket.mode = MODES[tenant.limiter_mode]
        bucket.max_wait = tenant.max_wait
        if is_new:
            # Who waits may have tokens now, or may not wait any more.
            bucket.serve(self.clock(), has_changed=True)

    def _sweep(self) -> None:
        for _ in range(min(SWEPT_AT_ONCE, len(self._buckets))):
            self._let_go(next(iter(self._buckets)))

    def _let_go(self, handle: str) -> None:
        bucket = self._buckets[handle]
        is_droppable = bucket.is_leased or bucket.is_full(self.clock())
        del bucket
        if not is_droppable:
            self._buckets.move_to_end(handle)
            return
        # Let go and see: a bucket that somebody holds is still there, and comes
        # back before anything else can happen.
        watch = weakref.ref(self._buckets.pop(handle))
        held = watch()
        if held is None:
            del self._records[handle]
        else:
            self._buckets[handle] = held

    def _is_repeated(self, handle: str) -> bool:
        record = self._records.get(handle)
        if record is None:
            return False
        now = self.clock()
        if now - record.refused_from > PROMPT_INTERVAL:
            record.refused_from = now
            record.refusals = 0
        record.refusals += 1
        return record.refusals >= PROMPT_REFUSALS

    # Leases.

    def question(self, record: _Record, bucket: TokenBucket) -> None:
        """Ask for a lease with the others that ask in this turn of the loop."""
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._send)
        self._asked.append((record, bucket))

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        now = self.clock()
        # While Redis is away one question at a time finds out whether it still is.
        if now < self._away_until or (self._is_away and self._lending):
            for record, bucket in asked:
                record.is_asked = False
                bucket.fail(now, max(self._away_until, now + AWAY_INTERVAL / 4))
            return
        for start in range(0, len(asked), ASKED_AT_ONCE):
            task = asyncio.create_task(self._lend(asked[start : start + ASKED_AT_ONCE]))
            self._lending.add(task)
            task.add_done_callback(self._lending.discard)

    @property
    def _is_away(self) -> bool:
        return self._away_until > -math.inf

    async def _lend(self, asked: list[tuple[_Record, TokenBucket]]) -> None:
        assert self._redis is not None
        sent_at = self.clock()
        first = self._sequence + 1
        calls = [
            (
                (keys.ratelimit(record.handle), keys.HOSTS, keys.EPOCH),
                self._arguments(record, each),
            )
            for record, each in asked
        ]
        self.ask_count += len(calls)
        try:
            answers = await self._redis.run_each(LEND, calls)
        except RedisUnavailable as error:
            if not self._is_away:
                logger.warning("no leases, only the floor: %s", error)
            self._away_until = self.clock() + AWAY_INTERVAL
            self.unanswered_count += len(calls)
            answers = [[]] * len(asked)
        else:
            if self._is_away:
                logger.info("leases are granted again")
            self._away_until = -math.inf
        for number, ((record, bucket), answer) in enumerate(
            zip(asked, answers, strict=True), first
        ):
            record.is_asked = False
            if isinstance(answer, RedisUnavailable):
                # One organisation's trouble is nobody else's.
                logger.error("no lease for %s: %s", record.handle, answer)
                bucket.fail(self.clock(), self.clock() + AWAY_INTERVAL)
            else:
                self._take_in(record, bucket, answer, sent_at, number)

    def _arguments(
        self, record: _Record, bucket: TokenBucket
    ) -> tuple[str | int | float, ...]:
        assert self._host is not None
        self._sequence += 1
        held, lacking, demand, minted, returned = bucket.ask(self.clock())
        return (
            self._host.name,
            self._sequence,
            held,
            lacking,
            demand,
            bucket.rate,
            bucket.capacity,
            record.version,
            round(TRICKLE_TTL * 1e6),
            round(CHUNK_TTL * 1e6),
            record.trickle,
            minted,
            returned,
            self._floor_hosts(bucket),
            self.config.floor,
        )

    def _take_in(
        self,
        record: _Record,
        bucket: TokenBucket,
        answer: list[bytes | int],
        sent_at: float,
        number: int,
    ) -> None:
        now = self.clock()
        if not answer:
            bucket.fail(now, max(self._away_until, now))
            return
        chunk, dropped, rate, capacity, wait = map(float, answer)
        record.trickle = number if rate else 0
        bucket.answer(
            now,
            chunk=chunk,
            dropped=dropped,
            chunk_until=sent_at + CHUNK_TTL,
            trickle_rate=rate,
            trickle_capacity=capacity,
            trickle_until=sent_at + TRICKLE_TTL,
            dry_until=now + wait * 1e-6,
        )

    # The floor: what is minted without asking.

    def _floor_hosts(self, bucket: TokenBucket) -> int:
        """How many hosts have a part in the floor: each must hold a whole token."""
        return min(self.config.max_hosts, int(self.config.floor * bucket.capacity))

    def _set_floor(self, bucket: TokenBucket) -> None:
        host = self._host
        if host is None:
            return
        hosts = self._floor_hosts(bucket)
        if host.number is None or host.number >= hosts:
            bucket.set_floor(0.0, 0.0, math.inf, -math.inf)
            return
        share = self.config.floor / hosts
        bucket.set_floor(
            bucket.rate * share, bucket.capacity * share, host.since, host.until
        )

    def _floor_changed(self) -> None:
        for bucket in self._buckets.values():
            self._set_floor(bucket)


def _advice(bucket: TokenBucket, wait: float) -> str:
    if math.isinf(wait):
        return f"send at most {math.floor(bucket.capacity)} statements per message"
    # Rounded up, so that who waits as told is not too early.
    return f"retry after {math.ceil(wait * 100) / 100:.2f} s"
