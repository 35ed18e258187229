"""Gate: whether a connection may come in.

Counts the connections that each organisation was admitted with in this process.
Knows no sockets; whoever got in is trusted to be reported gone. How fast queries
may come is `limiter`'s, how many strangers may knock is `listener`'s.
"""

from __future__ import annotations

from ogelproxy.errors import InternalError, TooManyConnections
from ogelproxy.tenants.model import Tenant


class Gate:
    """The connections of the organisations of one process: `admit`, then `leave`."""

    def __init__(self) -> None:
        self._admitted: dict[str, int] = {}  # by handle, without zeros

    def admit(self, tenant: Tenant) -> None:
        """Count a connection of `tenant` in.

        Call it when the credential is proven, never before: what an outsider
        can do costs an organisation no slot. Raises TooManyConnections.
        """
        count = self._admitted.get(tenant.handle, 0)
        limit = tenant.max_connections
        if count >= limit:
            raise TooManyConnections(
                f"{tenant.handle} has {count} of {limit} connections",
                detail=f"tier={tenant.tier.name} limit={limit} count={count}",
                hint="close connections you don't use, or upgrade for more",
            )
        self._admitted[tenant.handle] = count + 1

    def leave(self, handle: str) -> None:
        """Count a connection that was admitted out. Raises InternalError."""
        count = self._admitted.get(handle, 0)
        if count > 1:
            self._admitted[handle] = count - 1
        elif count == 1:
            del self._admitted[handle]
        else:
            raise InternalError(f"{handle} left the gate more often than it came")

    def count(self, handle: str) -> int:
        """Return the organisation's connections."""
        return self._admitted.get(handle, 0)

    def __len__(self) -> int:
        """Return how many organisations have connections."""
        return len(self._admitted)
