"""InMemoryDirectory: tenant records that an embedding service supplies itself."""

from __future__ import annotations

from collections.abc import Iterable

from ogelproxy.tenants.memory import Subscriber, Subscribers
from ogelproxy.tenants.model import Tenant


class InMemoryDirectory:
    """Tenant records that an embedding service supplies itself."""

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        self._records = {tenant.handle: tenant for tenant in tenants}
        self._subscribers = Subscribers()

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
