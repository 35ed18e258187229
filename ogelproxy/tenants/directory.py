"""Directory: tenants in memory, kept true by the control plane's pushes.

A record in memory stays true while the store is listening for changes, so it has
no time to live; what was missed while it was not is found by comparing versions.
All reads of the store pass through one loop, in batches. They never overlap, so
what a later one brings is newer: a late message can only cause a look, and never
bring an old record back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Protocol, TypeVar

from ogelproxy.config import Control
from ogelproxy.errors import ControlUnavailable
from ogelproxy.tenants.model import HANDLE, OPERATORS, Tenant

logger = logging.getLogger(__name__)

#: Called in the loop with the known record and what became of it, None when it was
#: deleted.
Subscriber = Callable[[Tenant, Tenant | None], None]

Answer = TypeVar("Answer")

LOAD_TENANTS = 64  # records of one read: some 3 ms of the loop's time
COMPARE_TENANTS = 2_000  # versions of one read
#: Unknown handles remembered: anyone may send them, so they have a bound of their
#: own and push no tenant out.
MAX_UNKNOWN = 10_000
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


class _Subscribers:
    """Those who want to know of changes; one that fails does not stop the others."""

    def __init__(self) -> None:
        self._all: list[Subscriber] = []

    def add(self, subscriber: Subscriber) -> None:
        self._all.append(subscriber)

    def tell(self, old: Tenant, new: Tenant | None) -> None:
        for subscriber in self._all:
            try:
                subscriber(old, new)
            except Exception:
                logger.exception("a change of %s was not taken in", old.handle)


class Directory:
    """Tenant records in front of a store; start before use, stop at the end.

    Keeps those that are held and at most `max_tenants` others, of which the least
    recently found goes first. While the control plane is away the last known
    records serve, up to `stale_ttl` seconds.
    """

    def __init__(
        self,
        store: TenantStore,
        config: Control,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._subscribers = _Subscribers()
        self._records: dict[str, Tenant] = {}  # all that are known
        #: Those of _records that may be evicted, least recently found first.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._holds: Counter[str] = Counter()  # by handle; those that may not
        #: Handles that did not exist, and when that is forgotten; oldest first.
        self._unknown: OrderedDict[str, float] = OrderedDict()
        #: What the loader reads next, and what it is reading: a change reported
        #: during a read asks for another one.
        self._wanted: dict[str, asyncio.Future[Tenant | None]] = {}
        self._loading: dict[str, asyncio.Future[Tenant | None]] = {}
        self._is_wanted = asyncio.Event()  # set while _wanted has something new
        self._is_listening = False  # changed by the store's reports
        #: From when changes may be missing; None once all records were compared.
        self._stale_since: float | None = None
        self._lost_looks = 0  # reads that failed, ever
        self._is_to_compare = asyncio.Event()  # set to compare all records now
        self._has_tried = asyncio.Event()  # set after the first attempt to listen
        self._tasks: list[asyncio.Task[None]] = []  # while started

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_degraded(self) -> bool:
        """Whether a change in the control plane might not have arrived."""
        return self._stale_since is not None

    @property
    def stale_since(self) -> float | None:
        """The clock's time from which changes may be missing; None for never."""
        return self._stale_since

    async def start(self) -> None:
        """Begin to listen; returns after the first attempt, also if it was in vain.

        Raises what listening raised if there can't be another attempt.
        """
        self._stale_since = self._clock()
        self._has_tried.clear()
        self._tasks = [
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._load()),
            asyncio.create_task(self._reconcile()),
        ]
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
        self._refuse_waiting(ControlUnavailable("the directory is stopped"))

    async def find(self, handle: str) -> Tenant | None:
        """Return the tenant, from memory or else from the store; None if unknown.

        Raises ControlUnavailable when neither can tell. The record may change
        while the caller awaits something: `hold` it and `peek` again.
        """
        record = self._records.get(handle)
        if record is not None and not self._is_expired():
            if handle in self._idle:
                self._idle.move_to_end(handle)
            return record
        if record is None and self._is_unknown(handle):
            return None
        if not self._tasks:
            raise ControlUnavailable("the directory is not started")
        loading = self._loading.get(handle)
        return await asyncio.shield(loading or self._want(handle))

    async def refresh(self, handle: str) -> Tenant | None:
        """Return the tenant as the store has it now; while it is away, as `find`."""
        if not self._tasks:
            raise ControlUnavailable("the directory is not started")
        try:
            return await asyncio.shield(self._want(handle))
        except ControlUnavailable:
            return await self.find(handle)

    def peek(self, handle: str) -> Tenant | None:
        """Return what memory holds, however old, without marking it as used."""
        return self._records.get(handle)

    def hold(self, handle: str) -> None:
        """Keep the record, and the news of it, until as many calls of `release`."""
        self._holds[handle] += 1
        self._idle.pop(handle, None)

    def release(self, handle: str) -> None:
        """Undo one `hold`."""
        self._holds[handle] -= 1
        if self._holds[handle] <= 0:
            del self._holds[handle]
            if handle in self._records:
                self._idle[handle] = None
                self._evict()

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call back whenever a record in memory changed or was deleted."""
        self._subscribers.add(subscriber)

    def _is_expired(self) -> bool:
        if self._stale_since is None:
            return False
        return self._clock() - self._stale_since > self._config.stale_ttl

    def _is_unknown(self, handle: str) -> bool:
        if handle != OPERATORS and not HANDLE.fullmatch(handle):
            return True
        forgotten_at = self._unknown.get(handle)
        if forgotten_at is None:
            return False
        if self._clock() < forgotten_at:
            return True
        del self._unknown[handle]
        return False

    def _want(self, handle: str) -> asyncio.Future[Tenant | None]:
        future = self._wanted.get(handle)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._wanted[handle] = future
        self._is_wanted.set()
        return future

    # What the store reports

    def _changed(self, payload: str) -> None:
        kind, _, name = payload.partition(":")
        if kind == "org":
            self._unknown.pop(name, None)
            if name in self._records or name in self._loading:
                self._want(name)
        elif kind == "tier":
            for handle, record in self._records.items():
                if record.tier.name == name:
                    self._want(handle)
            # Which tier these have is known too late.
            for handle in self._loading:
                self._want(handle)

    def _attached(self, is_listening: bool) -> None:
        self._is_listening = is_listening
        self._has_tried.set()
        if is_listening:
            # Nobody told of handles that came into being before.
            self._unknown.clear()
            self._is_to_compare.set()
        else:
            self._degrade("changes can't be heard")

    def _degrade(self, reason: object) -> None:
        if self._stale_since is None:
            self._stale_since = self._clock()
            self._is_to_compare.set()
            logger.warning("serving known tenants only: %s", reason)

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
        while True:
            await self._is_wanted.wait()
            batch = list(itertools.islice(self._wanted, LOAD_TENANTS))
            self._loading = {handle: self._wanted.pop(handle) for handle in batch}
            if not self._wanted:
                self._is_wanted.clear()
            try:
                found = await _answer(self._store.fetch_tenants(batch))
            except ControlUnavailable as error:
                self._lost_looks += 1
                self._degrade(error)
                self._refuse_waiting(error)
            else:
                loaded, self._loading = self._loading, {}
                for handle, future in loaded.items():
                    self._keep(handle, found.get(handle))
                    if not future.done():
                        future.set_result(found.get(handle))

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
            now, lost_looks = self._clock(), self._lost_looks
            try:
                await self._compare()
            except ControlUnavailable as error:
                self._degrade(error)
                retry_interval = min(retry_interval * 2, MAX_RETRY_INTERVAL)
                continue
            is_whole = self._lost_looks == lost_looks
            if self._is_listening and is_whole and not self._is_to_compare.is_set():
                if self._stale_since is not None:
                    logger.info("%d tenants are up to date", len(self._records))
                self._stale_since = None
                retry_interval = MIN_RETRY_INTERVAL
            else:
                # Asking now and then must do for as long as nobody tells.
                self._stale_since = now
                retry_interval = MAX_RETRY_INTERVAL

    async def _compare(self) -> None:
        """Read anew what differs from the store; raises ControlUnavailable."""
        handles = iter(list(self._records))
        while chunk := list(itertools.islice(handles, COMPARE_TENANTS)):
            versions = await _answer(self._store.fetch_versions(chunk))
            looks = [
                asyncio.shield(self._want(handle))
                for handle in chunk
                if (record := self._records.get(handle)) is not None
                and versions.get(handle) != record.version
            ]
            await asyncio.gather(*looks)

    # What was read

    def _refuse_waiting(self, error: ControlUnavailable) -> None:
        waiting = [*self._loading.values(), *self._wanted.values()]
        self._loading, self._wanted = {}, {}
        self._is_wanted.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                # Nobody may be waiting for a look that a message asked for.
                future.exception()

    def _keep(self, handle: str, new: Tenant | None) -> None:
        old = self._records.get(handle)
        if new is None:
            self._records.pop(handle, None)
            self._idle.pop(handle, None)
            self._unknown[handle] = self._clock() + self._config.negative_ttl
            if len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)
        else:
            self._records[handle] = new
            self._unknown.pop(handle, None)
            if handle not in self._holds:
                self._idle[handle] = None
                self._idle.move_to_end(handle)
            self._evict()
        if old is not None and (new is None or new.version != old.version):
            self._subscribers.tell(old, new)

    def _evict(self) -> None:
        while len(self._idle) > self._config.max_tenants:
            handle, _ = self._idle.popitem(last=False)
            del self._records[handle]


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


class InMemoryDirectory:
    """Tenant records that an embedding service supplies itself."""

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        self._records = {tenant.handle: tenant for tenant in tenants}
        self._subscribers = _Subscribers()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_degraded(self) -> bool:
        """False: there is nothing it could miss."""
        return False

    @property
    def stale_since(self) -> float | None:
        """None: there is nothing it could miss."""
        return None

    async def start(self) -> None:
        """Do nothing: the records are here."""

    async def stop(self) -> None:
        """Do nothing: the records stay."""

    async def find(self, handle: str) -> Tenant | None:
        """Return the tenant, or None."""
        return self._records.get(handle)

    async def refresh(self, handle: str) -> Tenant | None:
        """Return the tenant, or None."""
        return self._records.get(handle)

    def peek(self, handle: str) -> Tenant | None:
        """Return the tenant, or None."""
        return self._records.get(handle)

    def hold(self, handle: str) -> None:
        """Do nothing: no record is evicted."""

    def release(self, handle: str) -> None:
        """Do nothing: no record is evicted."""

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call back whenever a known record is replaced or removed."""
        self._subscribers.add(subscriber)

    def put(self, tenant: Tenant) -> None:
        """Add or replace a record, unless the known one is as new or newer."""
        old = self._records.get(tenant.handle)
        if old is not None and tenant.version <= old.version:
            return
        self._records[tenant.handle] = tenant
        if old is not None:
            self._subscribers.tell(old, tenant)

    def remove(self, handle: str) -> None:
        """Forget a record, if it is known."""
        old = self._records.pop(handle, None)
        if old is not None:
            self._subscribers.tell(old, None)
