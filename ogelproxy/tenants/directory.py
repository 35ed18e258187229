"""Directory: tenants in memory, kept true by what the control plane pushes.

Memory first, then Redis where there is one, then the store. A record that the store
gave stays true while the store is listened to, so it has no time to live; what was
missed while it was not is found by comparing versions. A record that Redis gave
serves at once and is compared at once.

Whoever reads the store writes to Redis, and Redis tells all: so a process that
can't hear the store learns of changes too. Versions say what is newer. Reads of the
store pass through one loop and never overlap, so a later one brings what is newer
in any case; beside what Redis told during a read, its answer counts only if it is
not older. So no late message or read brings an old record back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Literal, Protocol, TypeVar

from ogelproxy.config import Control
from ogelproxy.errors import ControlUnavailable, RedisUnavailable
from ogelproxy.metrics import CounterSample, GaugeSample
from ogelproxy.tenants.cache import RECORD_TTL, TenantCache
from ogelproxy.tenants.looks import Looks
from ogelproxy.tenants.memory import Memory, Subscriber, Subscribers
from ogelproxy.tenants.model import Tenant
from ogelproxy.tenants.seal import Entry

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Who answered a look, and what: None for a tenant that does not exist.
Source = Literal["memory", "redis", "postgres"]
Found = tuple[Source, Tenant | None]

LOAD_TENANTS = 64  # records of one read: some 3 ms of the loop's time
COMPARE_TENANTS = 2_000  # versions of one read
SUSPECT_INTERVAL = 0.2  # seconds until Redis is asked again what may have been missed
MIN_RETRY_INTERVAL = 0.1  # seconds
MAX_RETRY_INTERVAL = 5.0  # seconds


class TenantStore(Protocol):
    """Where records come from; `Store` is one. Methods may raise ControlUnavailable."""

    async def fetch_tenants(self, handles: Collection[str]) -> Mapping[str, Tenant]:
        """Return those of the tenants that exist, by handle."""

    async def fetch_versions(self, handles: Collection[str]) -> Mapping[str, int]:
        """Return the versions of those of the tenants that exist, by handle."""

    async def listen(
        self, changed: Callable[[str], None], attached: Callable[[bool], None]
    ) -> None:
        """Report changes (``org:HANDLE``, ``tier:NAME``) until cancelled."""


class TenantDirectory(Protocol):
    """What the layers ask; `Directory` and `InMemoryDirectory` are two."""

    @property
    def is_degraded(self) -> bool:
        """Whether a change in the control plane might not have arrived."""

    @property
    def stale_since(self) -> float | None:
        """The clock's time from which changes may be missing; None for never."""

    def __len__(self) -> int: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def find(self, handle: str) -> Tenant | None: ...
    async def refresh(self, handle: str) -> Tenant | None: ...
    def peek(self, handle: str) -> Tenant | None: ...
    def hold(self, handle: str) -> None: ...
    def release(self, handle: str) -> None: ...
    def subscribe(self, subscriber: Subscriber) -> None: ...


class Directory:
    """Tenant records in front of a store; start before use, stop at the end.

    Keeps those that are held and at most `max_tenants` others, of which the least
    recently found goes first. While the control plane is away the last known
    records serve, those in Redis too, up to `stale_ttl` seconds after they were true.
    """

    def __init__(
        self,
        store: TenantStore,
        config: Control,
        clock: Callable[[], float] = time.monotonic,
        cache: TenantCache | None = None,
    ) -> None:
        """`cache` is Redis, which is started after this and before `start`."""
        self._store = store
        self._config = config
        self._clock = clock
        self._cache = cache
        self._subscribers = Subscribers()
        self._memory = Memory(config, clock, self._subscribers)
        #: What is asked of the store: records, and versions of unproven records.
        self._loads: Looks[Found] = Looks()
        self._doubts: Looks[None] = Looks()
        #: What is asked of Redis, and of those that it announced the version that
        #: will do.
        self._recalls: Looks[Found] = Looks()
        self._announced: dict[str, int] = {}
        #: What Redis told of handles while the store was being asked for them.
        self._overtaken: dict[str, Entry] = {}
        self._is_listening = False  # changed by the store's reports
        self._is_heard = False  # changed by Redis's reports
        #: From when changes may be missing; None once all records were compared.
        self._stale_since: float | None = None
        self._lost_loads = 0  # reads that failed, ever
        self._is_to_compare = asyncio.Event()  # set to compare all records now
        self._comparisons = 0  # so far: says whose turn it is to be written again
        self._has_tried = asyncio.Event()  # set after the first attempt to listen
        self._lookups: Counter[Source] = Counter()  # answers to `find`, ever
        self._tasks: list[asyncio.Task[None]] = []  # while started
        if cache is not None:
            cache.hear(self._announce, self._heard)

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def is_degraded(self) -> bool:
        """Whether a change in the control plane might not have arrived."""
        return self._stale_since is not None

    @property
    def stale_since(self) -> float | None:
        """The clock's time from which changes may be missing; None for never."""
        return self._stale_since

    def samples(self) -> Iterator[CounterSample | GaugeSample]:
        """Say who answered lookups, and how many records the store didn't confirm."""
        sources: tuple[Source, ...] = ("memory", "redis", "postgres")
        for source in sources:
            yield CounterSample(
                "o7s_tenant_lookups_total", {"from": source}, self._lookups[source]
            )
        yield GaugeSample("o7s_tenants_unproven", {}, self._memory.unproven_count)

    async def start(self) -> None:
        """Begin to listen; returns after the first attempt, also if it was in vain.

        Raises what listening raised if there can't be another attempt.
        """
        self._stale_since = self._clock()
        self._has_tried.clear()
        loops = [self._listen(), self._load(), self._prove(), self._reconcile()]
        if self._cache is not None:
            loops += [self._recall(self._cache), self._cache.write(self._known)]
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        await self._has_tried.wait()
        listening = self._tasks[0]
        if listening.done():
            await self.stop()
            listening.result()

    async def stop(self) -> None:
        """End the loops and those who wait for a record."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._is_listening = False
        error = ControlUnavailable("the directory is stopped")
        self._recalls.refuse(error)
        self._loads.refuse(error)

    async def find(self, handle: str) -> Tenant | None:
        """Return the tenant, from memory, Redis or the store; None if unknown.

        Raises ControlUnavailable when none can tell. The record may change
        while the caller awaits something: `hold` it and `peek` again.
        """
        record = self._memory.get(handle)
        if record is not None and not self._is_expired(handle):
            self._memory.touch(handle)
            self._lookups["memory"] += 1
            return record
        if record is None and self._memory.is_unknown(handle):
            self._lookups["memory"] += 1
            return None
        waiting = self._waiting()
        if self._cache is None or handle in self._loads:
            self._loads.join(handle, waiting)
        elif self._cache.is_worth_asking:
            self._recalls.join(handle, waiting)
        else:
            self._loads.want(handle, waiting)
        source, found = await waiting
        self._lookups[source] += 1
        return found

    async def refresh(self, handle: str) -> Tenant | None:
        """Return the tenant as the store has it now; while it is away, as `find`."""
        waiting = self._waiting()
        self._loads.want(handle, waiting)
        try:
            _, found = await waiting
        except ControlUnavailable:
            return await self.find(handle)
        return found

    def peek(self, handle: str) -> Tenant | None:
        """Return what memory holds, however old, without marking it as used."""
        return self._memory.get(handle)

    def hold(self, handle: str) -> None:
        """Keep the record, and the news of it, until as many calls of `release`."""
        self._memory.hold(handle)

    def release(self, handle: str) -> None:
        """Undo one `hold`."""
        self._memory.release(handle)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call back whenever a record in memory changed or was deleted."""
        self._subscribers.add(subscriber)

    def _waiting(self) -> asyncio.Future[Found]:
        if not self._tasks:
            raise ControlUnavailable("the directory is not started")
        return asyncio.get_running_loop().create_future()

    def _true_at(self, handle: str) -> float:
        """The clock's time when the record in memory was surely true."""
        since = self._memory.unproven_since(handle)
        if since is None:
            since = self._stale_since
        return self._clock() if since is None else since

    def _is_expired(self, handle: str) -> bool:
        if self._stale_since is None:
            return False
        return self._clock() - self._true_at(handle) > self._config.stale_ttl

    # What the store reports

    def _changed(self, payload: str) -> None:
        kind, _, name = payload.partition(":")
        if kind == "org":
            self._memory.forget_unknown(name)
            if self._memory.get(name) is not None or self._is_asked(name):
                self._loads.want(name)
        elif kind == "tier":
            for handle in self._memory.of_tier(name):
                self._loads.want(handle)
            # Which tier these have is known too late.
            for handle in (*self._loads.asked, *self._recalls.asked):
                self._loads.want(handle)

    def _is_asked(self, handle: str) -> bool:
        return self._loads.is_asked(handle) or self._recalls.is_asked(handle)

    def _attached(self, is_listening: bool) -> None:
        self._is_listening = is_listening
        self._has_tried.set()
        if is_listening:
            # Nobody told of handles that came into being before.
            self._memory.forget_unknown()
            self._is_to_compare.set()
        else:
            self._degrade("changes can't be heard")

    def _degrade(self, reason: object) -> None:
        if self._stale_since is None:
            self._stale_since = self._clock()
            self._is_to_compare.set()
            logger.warning("serving known tenants only: %s", reason)

    # What Redis reports

    def _announce(self, handle: str, version: int, is_gone: bool) -> None:
        """Take in that others know a version, or that it was the last one."""
        self._memory.forget_unknown(handle)
        record = self._memory.get(handle)
        if record is None:
            is_news = self._is_asked(handle)
        else:
            is_news = is_gone or version > record.version
        if not is_news or self._cache is None:
            return
        is_known = record is None or version >= record.version
        if is_known and self._cache.is_worth_asking:
            self._announced[handle] = max(version, self._announced.get(handle, 0))
            self._recalls.want(handle)
        else:
            # Redis is no help, or a deletion was seen by who knew less.
            self._loads.want(handle)

    def _heard(self, is_heard: bool) -> None:
        """Make up for what was not heard, and for what Redis may have lost."""
        self._is_heard = is_heard
        if not is_heard or self._cache is None:
            return
        if self.is_degraded:
            self._suspect(self._memory.handles)
        else:
            for handle in self._memory.held:
                self._cache.note(handle)

    def _suspect(self, handles: Collection[str]) -> None:
        """Recall what Redis may know better, though nobody said so."""
        if self._is_heard and self.is_degraded:
            for handle in handles:
                self._recalls.want(handle)

    # The loops

    async def _listen(self) -> None:
        try:
            await self._store.listen(self._changed, self._attached)
        except Exception as error:
            self._is_listening = False
            self._degrade(error)
            raise
        finally:
            self._has_tried.set()

    async def _load(self) -> None:
        """Ask the store for records."""
        while True:
            handles = await self._loads.take(LOAD_TENANTS)
            self._overtaken.clear()
            try:
                found = await _answer(self._store.fetch_tenants(handles))
            except ControlUnavailable as error:
                self._lost_loads += 1
                self._degrade(error)
                self._loads.refuse(error)
            else:
                for handle in handles:
                    self._keep(handle, found.get(handle))

    async def _recall(self, cache: TenantCache) -> None:
        """Ask Redis for records, and the store for those that it doesn't have."""
        while True:
            handles = await self._recalls.take(LOAD_TENANTS)
            wanted = {handle: self._announced.pop(handle, 0) for handle in handles}
            entries: Mapping[str, Entry] = {}
            is_answered = False
            try:
                entries = await cache.fetch(handles)
                is_answered = True
            except RedisUnavailable:
                pass  # it has been logged; the store is asked
            except Exception:
                logger.exception("records in Redis can't be read")
            suspected = []
            for handle, version in wanted.items():
                if not self._recalls.is_asked(handle):
                    continue  # the store was faster
                entry = entries.get(handle)
                if entry is not None and entry.version >= version:
                    age = cache.age(entry)
                    if self._believe(entry, self._clock() - age):
                        found: Found = ("redis", self._memory.get(handle))
                        self._recalls.answer(handle, found)
                        continue
                waiting = self._recalls.release(handle)
                if waiting or version:
                    self._loads.want(handle, *waiting)
                elif not is_answered:
                    suspected.append(handle)
            if suspected:
                # The channel is heard, so that the other connections come back too.
                loop = asyncio.get_running_loop()
                loop.call_later(SUSPECT_INTERVAL, self._suspect, suspected)

    async def _prove(self) -> None:
        """Compare what Redis gave with the store."""
        while True:
            handles = await self._doubts.take(COMPARE_TENANTS)
            try:
                for handle in await self._differing(handles):
                    self._loads.want(handle)
            except ControlUnavailable as error:
                # All records are compared when it is back.
                self._lost_loads += 1
                self._degrade(error)
            for handle in handles:
                self._doubts.answer(handle, None)

    async def _reconcile(self) -> None:
        retry_interval = MIN_RETRY_INTERVAL
        while True:
            is_stale = self._stale_since is not None
            interval = retry_interval if is_stale else self._config.reconcile_interval
            try:
                async with asyncio.timeout(interval):
                    await self._is_to_compare.wait()
            except TimeoutError:
                pass
            self._is_to_compare.clear()
            now, lost_loads = self._clock(), self._lost_loads
            try:
                await self._compare()
            except ControlUnavailable as error:
                self._degrade(error)
                retry_interval = min(retry_interval * 2, MAX_RETRY_INTERVAL)
                continue
            is_whole = self._lost_loads == lost_loads
            if self._is_listening and is_whole and not self._is_to_compare.is_set():
                if self._stale_since is not None:
                    logger.info("%d tenants are up to date", len(self._memory))
                self._stale_since = None
                retry_interval = MIN_RETRY_INTERVAL
                self._renew()
            else:
                # Asking now and then must do for as long as nobody tells.
                self._stale_since = now
                retry_interval = MAX_RETRY_INTERVAL

    async def _compare(self) -> None:
        """Read anew what differs from the store; raises ControlUnavailable."""
        handles = iter(self._memory.handles)
        while chunk := list(itertools.islice(handles, COMPARE_TENANTS)):
            looks = []
            for handle in await self._differing(chunk):
                looks.append(self._waiting())
                self._loads.want(handle, looks[-1])
            await asyncio.gather(*looks)

    async def _differing(self, handles: Collection[str]) -> list[str]:
        """Return those that differ from the store; the others are proven."""
        versions = await _answer(self._store.fetch_versions(handles))
        differing = []
        for handle in handles:
            record = self._memory.get(handle)
            if record is None:
                continue
            if versions.get(handle) == record.version:
                self._memory.prove(handle)
            else:
                differing.append(handle)
        return differing

    def _renew(self) -> None:
        """Write a part of the records again, so that none expires in Redis."""
        if self._cache is None:
            return
        turns = max(1, int(RECORD_TTL / 2 / self._config.reconcile_interval))
        self._comparisons += 1
        for handle in self._memory.handles:
            if (zlib.crc32(handle.encode()) + self._comparisons) % turns == 0:
                self._cache.note(handle)

    # What was read

    def _keep(self, handle: str, new: Tenant | None) -> None:
        """Take in what the store said, and answer with it."""
        told = self._overtaken.get(handle)
        if told is not None and _is_older(new, told):
            self._loads.want(handle, *self._loads.release(handle))
            return
        if new is not None:
            self._memory.put(new)
            if self._cache is not None:
                self._cache.note(handle)
        else:
            old = self._memory.drop(handle)
            if old is not None and self._cache is not None:
                self._cache.note(handle, old.version)
        self._loads.answer(handle, ("postgres", new))
        # What Redis may say now is not newer.
        self._recalls.answer(handle, ("postgres", new))

    def _believe(self, entry: Entry, true_at: float) -> bool:
        """Take in what Redis holds; return whether memory may answer now."""
        handle = entry.handle
        record = self._memory.get(handle)
        if entry.record is None:
            if record is None or record.version > entry.version:
                return False  # it may exist again
            # It had no later version: one that comes back gets a higher one.
            self._overtake(entry)
            self._memory.drop(handle)
            return True
        if record is not None and record.version > entry.version:
            return not self._is_expired(handle)
        if record is not None and record.version == entry.version:
            if self._true_at(handle) >= true_at:
                return not self._is_expired(handle)
        elif self._stale_since is not None:
            if self._clock() - true_at > self._config.stale_ttl:
                return False
        self._overtake(entry)
        self._memory.put(entry.record, true_at)
        self._doubts.want(handle)
        return not self._is_expired(handle)

    def _overtake(self, entry: Entry) -> None:
        if self._loads.is_asked(entry.handle):
            self._overtaken[entry.handle] = entry

    def _known(self, handle: str) -> tuple[Tenant, float] | None:
        """The record to write to Redis, and how many seconds ago it was true."""
        record = self._memory.get(handle)
        if record is None or self._memory.unproven_since(handle) is not None:
            return None
        return record, self._clock() - self._true_at(handle)


def _is_older(new: Tenant | None, told: Entry) -> bool:
    """Whether the store's answer may be older than what Redis told meanwhile."""
    if new is None:
        return told.record is not None
    return new.version < told.version + (told.record is None)


async def _answer(question: Awaitable[Answer]) -> Answer:
    """Await the store's answer; what else it may raise becomes ControlUnavailable.

    So a defect there ends no loop, and those who wait get an answer.
    """
    try:
        return await question
    except ControlUnavailable:
        raise
    except Exception as error:
        logger.exception("the control plane can't be read")
        raise ControlUnavailable(type(error).__name__) from error
