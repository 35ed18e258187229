"""Gate: whether a connection may come in.

Counts the connections of this process: all of them and those that log in, and
of each organisation those that were admitted. Knows no sockets; whoever got in
is trusted to be reported gone. How fast queries may come is `limiter`'s.
"""

from __future__ import annotations

from ogelproxy.config import Listen
from ogelproxy.errors import InternalError, ServerBusy, TooManyConnections
from ogelproxy.tenants.model import Tenant


class Gate:
    """The connections of one process, and their three maxima.

    Three pairs, each second half once per first: `enter` and `exit` around a
    client's connection, `begin_login` and `end_login` around its login,
    `admit` and `leave` around its life as an organisation's.
    """

    def __init__(self, config: Listen) -> None:
        self._config = config
        self._clients = 0  # between enter and exit
        self._logins = 0  # between begin_login and end_login
        self._admitted: dict[str, int] = {}  # by handle, without zeros

    @property
    def client_count(self) -> int:
        """Connections of this process, logged in or not."""
        return self._clients

    @property
    def login_count(self) -> int:
        """Clients that are logging in."""
        return self._logins

    def enter(self) -> None:
        """Let a connection in. Raises ServerBusy at `listen.max_clients`."""
        if self._clients >= self._config.max_clients:
            raise ServerBusy(f"{self._clients} clients are connected")
        self._clients += 1

    def exit(self) -> None:
        """Count a connection out."""
        self._clients -= 1

    def begin_login(self) -> None:
        """Let a client begin to log in. Raises ServerBusy at `listen.max_logins`."""
        if self._logins >= self._config.max_logins:
            raise ServerBusy(f"{self._logins} clients are logging in")
        self._logins += 1

    def end_login(self) -> None:
        """Count a login that ended, well or not."""
        self._logins -= 1

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
