"""Gate: whether a connection may come in.

Counts the connections that organisations were admitted with in this process, and
where there are more processes has their slots kept elsewhere (`slots`, `front`).
Knows no sockets; whoever got in is trusted to be reported gone. How fast queries
may come is `limiter`'s, how many strangers may knock is `listener`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ogelproxy.errors import InternalError, OgelError, TooManyConnections
from ogelproxy.tenants.model import Tenant


class Slots(Protocol):
    """Who keeps the slots that this process shares with others."""

    async def take(
        self, handle: str, holder: Admission, maximum: int, version: int
    ) -> int | None:
        """Take a slot; return None, or how many there are when there is no room.

        Raises RedisUnavailable or LineFailed where that can't be known.
        """

    def give(self, handle: str, holder: Admission) -> None:
        """Give it back; not when it was lost."""

    def total(self, handle: str) -> int:
        """Return how many there are over all machines, as last known."""


class Admission:
    """One connection that was let in, until it leaves or loses its slot."""

    __slots__ = ("error", "handle", "is_counted", "on_lost")

    def __init__(self, handle: str) -> None:
        self.handle = handle
        #: Called with the error that ends the connection; set when it is logged in.
        self.on_lost: Callable[[OgelError], None] | None = None
        #: Why its slot is lost; a login that finds it here fails with it.
        self.error: OgelError | None = None
        self.is_counted = False  # in this process; changed by the gate


class Gate:
    """The connections of the organisations of one process: `admit`, then `leave`."""

    def __init__(self) -> None:
        #: None in a process that is alone; set before the first is admitted.
        self.slots: Slots | None = None
        self._admitted: dict[str, int] = {}  # by handle, without zeros

    async def admit(self, tenant: Tenant) -> Admission:
        """Count a connection of `tenant` in.

        Call it when the credential is proven, never before: what an outsider
        can do costs an organisation no slot. Raises TooManyConnections, and
        RedisUnavailable or LineFailed where the others can't be counted.
        """
        admission = Admission(tenant.handle)
        admitted, limit = self._admitted, tenant.max_connections
        if self.slots is None:
            count = admitted.get(tenant.handle, 0)
            refused = count if count >= limit else None
        else:
            refused = await self.slots.take(
                tenant.handle, admission, limit, tenant.version
            )
        if refused is not None:
            raise TooManyConnections(
                f"{tenant.handle} has {refused} of {limit} connections",
                detail=f"tier={tenant.tier.name} limit={limit} count={refused}",
                hint="close connections you don't use, or upgrade for more",
            )
        if admission.error is not None:
            raise admission.error  # lost as soon as it was got
        admitted[tenant.handle] = admitted.get(tenant.handle, 0) + 1
        admission.is_counted = True
        return admission

    def leave(self, admission: Admission) -> None:
        """Count a connection that was admitted out. Raises InternalError."""
        admission.on_lost = None
        if admission.error is not None:
            return
        if not admission.is_counted:
            raise InternalError(f"{admission.handle} left the gate twice")
        self._count_out(admission)
        if self.slots is not None:
            self.slots.give(admission.handle, admission)

    def lose(self, admission: Admission, error: OgelError) -> None:
        """Count a connection out that lost its slot; it ends with `error`."""
        admission.error = error
        if admission.is_counted:
            self._count_out(admission)
        if admission.on_lost is not None:
            admission.on_lost(error)

    def _count_out(self, admission: Admission) -> None:
        admission.is_counted = False
        count = self._admitted[admission.handle]
        if count > 1:
            self._admitted[admission.handle] = count - 1
        else:
            del self._admitted[admission.handle]

    def count(self, handle: str) -> int:
        """Return the organisation's connections in this process."""
        return self._admitted.get(handle, 0)

    def total(self, handle: str) -> int:
        """Return the organisation's connections over all machines, as last known."""
        if self.slots is None:
            return self.count(handle)
        # What is known of others may be older than our own.
        return max(self.slots.total(handle), self.count(handle))

    def __len__(self) -> int:
        """Return how many organisations have connections."""
        return len(self._admitted)
