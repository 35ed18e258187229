"""Slots: the connections of organisations over all machines, kept in Redis.

One `Slots` per machine: of the engine that runs alone, or of the supervisor for its
workers. It leases as many slots as there are connections, renews the leases, and
gives up what it can no longer prove. The rules are `slots.lua`'s; what a connection
is, and how it ends, is known to whoever takes slots.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ogelproxy import keys
from ogelproxy.errors import OgelError, RedisUnavailable, TooManyConnections
from ogelproxy.redis import Call, Redis, Script

log = logging.getLogger(__name__)

SCRIPT = Script.read("epoch.lua", "slots.lua")

#: Seconds for which slots are ours, counted from before they were asked for.
LEASE_TTL = 8.0
#: How many times as long Redis keeps them: clocks' rates may differ by a tenth.
KEPT_RATIO = 1.1
#: Seconds between renewals: three may fail before a lease runs out.
RENEWAL_INTERVAL = 2.0
#: Seconds between looks for leases that ran out, where that ends connections; less
#: than Redis keeps them longer than we do.
EXPIRY_INTERVAL = 0.25
#: Seconds until others may have a slot that was given back: programs that connect for
#: each query take it again here, for nothing.
RETURN_DELAY = 0.01
#: Seconds for which what was given back is kept here nevertheless, while most of the
#: maximum is free, and on to the next renewal: else a trip to Redis and back would be
#: the most expensive part of a login.
SPARE_TTL = 1.0
#: Organisations that are asked about in one pipeline: some ms of Redis's time, which
#: a login may have to wait for.
MAX_BATCH = 128
#: Seconds in which slots are given back at the end; they would come back by themselves.
FAREWELL_TIMEOUT = 1.0

#: How often is asked for one that waits, where Redis doesn't answer: a connection to it
#: may have been lost long ago, and the next one be good.
MAX_TRIES = 2

#: Whoever has a slot, or waits for one: a connection.
Holder = TypeVar("Holder", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Wait(Generic[Holder]):
    """One that waits for a slot."""

    holder: Holder
    #: None when it has got one, else the connections that leave no room.
    answer: asyncio.Future[int | None]
    is_asked: bool = False  # for, by the latest request
    tries: int = 0  # that had no answer


@dataclass(slots=True, eq=False)
class _Holding(Generic[Holder]):
    """What this machine has of one organisation's slots."""

    maximum: int  # of connections, as of `version`
    version: int  # of the tenant's record
    holders: dict[Holder, None] = field(default_factory=dict)  # the newest is last
    waits: deque[_Wait[Holder]] = field(
        default_factory=deque
    )  # in order of their coming
    slots: int = 0  # kept for us until `expires_at`; changed by requests and answers
    expires_at: float = 0.0  # by our clock, from before the latest proof was asked for
    others: int = 0  # slots of other machines, as Redis last said
    full_at: float = -math.inf  # by our clock, when all slots were last in use
    is_unsure: bool = False  # whether the latest request had no answer
    asked_at: float = 0.0  # when the latest request was sent

    @property
    def total(self) -> int:
        return self.others + len(self.holders)

    @property
    def is_roomy(self) -> bool:
        """Whether at most half of the maximum is taken: ours, spare ones and others'.

        So whatever is spare, any machine can get the other half.
        """
        return self.others + self.slots <= self.maximum // 2

    def wanted(self, now: float) -> int:
        """How many slots to have: used, waited for, or soon to be used again."""
        waiting = sum(not wait.answer.done() for wait in self.waits)
        wanted = len(self.holders) + waiting
        if now < self.full_at + SPARE_TTL and self.is_roomy:
            return max(wanted, self.slots)
        return wanted

    def hold(self, holder: Holder, now: float) -> None:
        self.holders[holder] = None
        if len(self.holders) >= self.slots:
            self.full_at = now

    def next_wait(self) -> _Wait[Holder] | None:
        """Return who waits longest, without those that gave up."""
        while self.waits and self.waits[0].answer.done():
            self.waits.popleft()
        return self.waits[0] if self.waits else None

    def admit(self, wait: _Wait[Holder], now: float) -> None:
        self.waits.remove(wait)
        self.hold(wait.holder, now)
        wait.answer.set_result(None)


class Slots(Generic[Holder]):
    """The slots of one machine; `start` before use, `stop` at the end."""

    def __init__(
        self,
        redis: Redis,
        *,
        is_strict: bool,
        on_lost: Callable[[Holder, OgelError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_strict` ends connections whose lease runs out.

        `on_lost` is told of a connection that has no slot any more, and why: it has
        to end, and isn't given back. It may be one whose `take` has just returned.
        """
        self._redis = redis
        self._is_strict = is_strict
        self._on_lost = on_lost
        self._clock = clock
        # A process that comes back under the same name is another host.
        self._host = f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)  # of requests
        # By organisation; who was asked for longest ago is first.
        self._holdings: OrderedDict[str, _Holding[Holder]] = OrderedDict()
        # Organisations that something is to be asked for before they are due.
        self._urgent: dict[str, None] = {}
        self._has_urgent = asyncio.Event()
        # Organisations whose slots are given back in a moment.
        self._returning: dict[str, None] = {}
        self._asking = asyncio.Lock()  # held while a pipeline is under way
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to ask and to renew."""
        self._tasks = [asyncio.create_task(self._run(), name="slots")]
        if self._is_strict:
            self._tasks.append(asyncio.create_task(self._expire(), name="slots-expiry"))

    async def stop(self) -> None:
        """Tell Redis what was given back; the connections are gone by now."""
        async with self._asking:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._urgent = dict.fromkeys(self._holdings)
        for holding in self._holdings.values():
            holding.full_at = -math.inf  # nobody comes again
        try:
            async with asyncio.timeout(FAREWELL_TIMEOUT):
                while self._redis.is_up and (batch := self._batch(self._clock())):
                    await self._ask(batch)
        except TimeoutError:
            log.warning("slots of connections come back when their leases run out")

    # What connections do.

    async def take(
        self, handle: str, holder: Holder, maximum: int, version: int
    ) -> int | None:
        """Take a slot; `version` says which of two maxima is newer.

        Return None, or how many connections there are when they leave no room.
        Raises RedisUnavailable. May take as long as leases live where Redis was
        restarted.
        """
        holding = self._holdings.get(handle)
        if holding is None:
            holding = self._holdings[handle] = _Holding(maximum, version)
        elif version >= holding.version:
            holding.maximum, holding.version = maximum, version
        if not holding.waits and self._has_room(holding):
            holding.hold(holder, self._clock())
            return None
        wait = _Wait(holder, asyncio.get_running_loop().create_future())
        holding.waits.append(wait)
        self._hurry(handle)
        try:
            return await wait.answer
        except asyncio.CancelledError:
            if wait.answer.cancelled():
                self._hurry(handle)
            elif wait.answer.exception() is None and holder in holding.holders:
                self.give(handle, holder)
            raise

    def give(self, handle: str, holder: Holder) -> None:
        """Give a slot back that was taken and not lost."""
        holding = self._holdings[handle]
        del holding.holders[holder]
        if holding.slots <= holding.wanted(self._clock()):
            return
        if not self._returning:
            asyncio.get_running_loop().call_later(RETURN_DELAY, self._return)
        self._returning[handle] = None

    def _return(self) -> None:
        self._urgent.update(self._returning)
        self._returning.clear()
        self._has_urgent.set()

    def total(self, handle: str) -> int:
        """Return an organisation's connections over all machines, as last known.

        That is 0 where this machine has none.
        """
        holding = self._holdings.get(handle)
        return 0 if holding is None else holding.total

    @property
    def unproven_count(self) -> int:
        """Connections whose lease has run out."""
        now = self._clock()
        return sum(
            len(holding.holders)
            for holding in self._holdings.values()
            if holding.expires_at <= now
        )

    def _has_room(self, holding: _Holding[Holder]) -> bool:
        """Whether one more is within what is ours and what is allowed.

        What was given back is still ours until Redis is told.
        """
        return (
            len(holding.holders) < holding.slots
            and holding.total < holding.maximum
            and self._clock() < holding.expires_at
        )

    # What is asked of Redis: one pipeline at a time, so that an organisation's
    # requests are answered in the order in which they were made.

    def _hurry(self, handle: str) -> None:
        self._urgent[handle] = None
        self._has_urgent.set()

    async def _run(self) -> None:
        while True:
            batch = self._batch(self._clock())
            if batch:
                try:
                    async with self._asking:
                        await self._ask(batch)
                except Exception:
                    log.exception("leases of connections were not renewed")
                    await asyncio.sleep(EXPIRY_INTERVAL)
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until something is urgent or due."""
        self._has_urgent.clear()
        delay = None
        if self._holdings:
            first = next(iter(self._holdings.values()))
            delay = max(first.asked_at + RENEWAL_INTERVAL - self._clock(), 0.001)
        try:
            async with asyncio.timeout(delay):
                await self._has_urgent.wait()
        except TimeoutError:
            pass

    def _batch(self, now: float) -> list[str]:
        """Choose whom to ask for: who is urgent or due, neither without the other."""
        batch: dict[str, None] = {}
        for handle, holding in self._holdings.items():
            is_due = holding.asked_at + RENEWAL_INTERVAL <= now
            if not is_due or len(batch) == MAX_BATCH // 2:
                break
            batch[handle] = None
        for handle in list(itertools.islice(self._urgent, MAX_BATCH // 2)):
            del self._urgent[handle]
            if handle in self._holdings:
                batch[handle] = None
        return list(batch)

    async def _ask(self, batch: list[str]) -> None:
        now = self._clock()
        calls = [self._call(handle, now) for handle in batch]
        try:
            answers = await self._redis.run(SCRIPT, calls)
        except RedisUnavailable as error:
            for handle in batch:
                self._fail(handle, error)
        else:
            for handle, answer in zip(batch, answers, strict=True):
                self._take_in(handle, now, *answer)
        self._forget_unused(batch)

    def _forget_unused(self, handles: Iterable[str]) -> None:
        for handle in handles:
            holding = self._holdings[handle]
            if not (holding.holders or holding.next_wait() or holding.slots):
                del self._holdings[handle]

    def _call(self, handle: str, now: float) -> Call:
        """Make the request of one organisation, and note that it is under way."""
        holding = self._holdings[handle]
        waits = [wait for wait in holding.waits if not wait.answer.done()]
        used = len(holding.holders)
        wanted = holding.wanted(now)
        is_leased = now < holding.expires_at
        if holding.is_unsure and is_leased:
            # What is ours is kept while Redis is away: clients come back, too.
            wanted = max(wanted, holding.slots)
        # From here on Redis may know us to have no more than we ask for.
        holding.slots = min(holding.slots, wanted)
        holding.asked_at = now
        self._holdings.move_to_end(handle)
        holding.waits = deque(waits)
        for wait in waits:
            wait.is_asked = True
        return (
            (keys.connections(handle), keys.EPOCH, keys.HOSTS),
            (
                self._host,
                next(self._numbers),
                used,
                holding.slots if is_leased else 0,
                wanted,
                holding.maximum,
                round(LEASE_TTL * KEPT_RATIO * 1e6),
            ),
        )

    def _take_in(
        self,
        handle: str,
        asked_at: float,
        slots: int,
        total: int,
        again: int,
        is_firm: int,
    ) -> None:
        """Act on an answer of the script; `again` is in microseconds."""
        holding = self._holdings[handle]
        if slots < 0:
            # Somebody uses our name, or numbers; nothing of it is known to be ours.
            self._fail(handle, RedisUnavailable("a request came too late"))
            return
        holding.is_unsure = False
        holding.slots, holding.others = slots, total - slots
        if is_firm:
            holding.expires_at = asked_at + LEASE_TTL
            while len(holding.holders) > slots:
                detail = f"limit={holding.maximum} count={holding.total}"
                self._lose(handle, holding, TooManyConnections(detail=detail))
        while (wait := holding.next_wait()) and self._has_room(holding):
            holding.admit(wait, self._clock())
        if again > 0:
            # Redis doesn't know all yet.
            asyncio.get_running_loop().call_later(again / 1e6, self._hurry, handle)
            return
        if not is_firm or self._clock() < holding.expires_at:
            while (wait := holding.next_wait()) and wait.is_asked:
                wait.answer.set_result(holding.total)
        if holding.next_wait() or holding.wanted(self._clock()) != slots:
            self._hurry(handle)

    def _fail(self, handle: str, error: RedisUnavailable) -> None:
        """Let those in for whom the lease has room, and refuse others after a while."""
        holding = self._holdings[handle]
        holding.is_unsure = True
        while (wait := holding.next_wait()) and self._has_room(holding):
            holding.admit(wait, self._clock())
        for wait in list(holding.waits):
            wait.tries += wait.is_asked
            if wait.tries >= MAX_TRIES and not wait.answer.done():
                wait.answer.set_exception(error)
        if holding.next_wait():
            self._hurry(handle)

    def _lose(self, handle: str, holding: _Holding[Holder], error: OgelError) -> None:
        holder, _ = holding.holders.popitem()
        log.warning("a connection lost its slot: %s", error, extra={"tenant": handle})
        self._on_lost(holder, error)

    # Where nothing may be used without proof.

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL)
            self._end_unproven()

    def _end_unproven(self) -> None:
        before = self._clock() + EXPIRY_INTERVAL  # the next look is too late
        for handle, holding in self._holdings.items():
            if holding.expires_at <= before:
                while holding.holders:
                    self._lose(handle, holding, RedisUnavailable())
