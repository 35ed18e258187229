"""Memory: tenant records in this process, and who is told when they change.

It decides what is kept: all that are held, some of the others, and some handles that
don't exist. Where records come from, and whether they are true, is `directory`'s.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable

from ogelproxy.config import Control
from ogelproxy.tenants.model import HANDLE, OPERATORS, Tenant

logger = logging.getLogger(__name__)

#: Called in the loop with the known record and what became of it, None when it was
#: deleted.
Subscriber = Callable[[Tenant, Tenant | None], None]

#: Unknown handles remembered: anyone may send them, so they have a bound of their
#: own and push no tenant out.
MAX_UNKNOWN = 10_000


def is_handle(name: str) -> bool:
    """Whether a record may have that handle."""
    return name == OPERATORS or HANDLE.fullmatch(name) is not None


class Subscribers:
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


class Memory:
    """Records by handle: those that are held, and at most `max_tenants` others.

    Of the others the least recently used goes first.
    """

    def __init__(
        self, config: Control, clock: Callable[[], float], subscribers: Subscribers
    ) -> None:
        self._config = config
        self._clock = clock
        self._subscribers = subscribers
        self._records: dict[str, Tenant] = {}  # all that are known
        #: Those of _records that may be evicted, least recently used first.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._holds: Counter[str] = Counter()  # by handle; those that may not
        #: Of records that the store has not confirmed: the clock's time when they
        #: were true.
        self._unproven: dict[str, float] = {}
        #: Handles that did not exist, and when that is forgotten; oldest first.
        self._unknown: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def handles(self) -> list[str]:
        return list(self._records)

    @property
    def held(self) -> list[str]:
        """The handles of records that are held."""
        return [handle for handle in self._holds if handle in self._records]

    @property
    def unproven_count(self) -> int:
        """Records that the store has not confirmed."""
        return len(self._unproven)

    def of_tier(self, name: str) -> list[str]:
        """The handles of records whose tier it is."""
        return [h for h, record in self._records.items() if record.tier.name == name]

    def get(self, handle: str) -> Tenant | None:
        return self._records.get(handle)

    def touch(self, handle: str) -> None:
        """Mark a known record as used."""
        if handle in self._idle:
            self._idle.move_to_end(handle)

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

    def put(self, new: Tenant, true_at: float | None = None) -> None:
        """Keep a record in the place of an old one, and tell of a new version.

        `true_at` is the clock's time when it was true, if the store didn't say it.
        """
        handle = new.handle
        old = self._records.get(handle)
        self._records[handle] = new
        self._unknown.pop(handle, None)
        if true_at is None:
            self._unproven.pop(handle, None)
        else:
            self._unproven[handle] = true_at
        if handle not in self._holds:
            self._idle[handle] = None
            self._idle.move_to_end(handle)
        self._evict()
        if old is not None and new.version != old.version:
            self._subscribers.tell(old, new)

    def drop(self, handle: str) -> Tenant | None:
        """Remember that it does not exist; return, and tell of, what was known."""
        old = self._records.pop(handle, None)
        self._idle.pop(handle, None)
        self._unproven.pop(handle, None)
        self._unknown[handle] = self._clock() + self._config.negative_ttl
        if len(self._unknown) > MAX_UNKNOWN:
            self._unknown.popitem(last=False)
        if old is not None:
            self._subscribers.tell(old, None)
        return old

    def prove(self, handle: str) -> None:
        """Note that the store has that very record."""
        self._unproven.pop(handle, None)

    def unproven_since(self, handle: str) -> float | None:
        """When the record was true, if the store did not confirm it since."""
        return self._unproven.get(handle)

    def is_unknown(self, handle: str) -> bool:
        """Whether it can't exist, or did not a short while ago."""
        if not is_handle(handle):
            return True
        forgotten_at = self._unknown.get(handle)
        if forgotten_at is None:
            return False
        if self._clock() < forgotten_at:
            return True
        del self._unknown[handle]
        return False

    def forget_unknown(self, handle: str | None = None) -> None:
        """Forget that a handle, or any, does not exist."""
        if handle is None:
            self._unknown.clear()
        else:
            self._unknown.pop(handle, None)

    def _evict(self) -> None:
        while len(self._idle) > self._config.max_tenants:
            handle, _ = self._idle.popitem(last=False)
            del self._records[handle]
            self._unproven.pop(handle, None)
