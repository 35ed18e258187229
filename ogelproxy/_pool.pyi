import asyncio
from collections import deque
from typing import Any

from ogelproxy._connection import Connection
from ogelproxy._statements import StatementCache

class Settings:
    """Session settings; one object for equal ones within a pool."""

    items: tuple[tuple[str, str], ...]
    parsing: tuple[tuple[str, str], ...]
    statuses: bytes | None
    restore: bytes | None
    def __init__(self, items: tuple[tuple[str, str], ...]) -> None: ...

class Pooled(Connection):
    """A connection that a pool may hold."""

    settings: Settings | None

class PoolCore:
    """Idle servers, last in first out, and waiting clients, first in first out."""

    mode: int
    statements: StatementCache
    baseline: Settings
    provers: deque[asyncio.Future[Any]]
    size: int
    max_prepared: int
    epoch: int
    surplus: int
    tenure: float
    def __init__(
        self, mode: int, max_statement_bytes: int, max_prepared: int
    ) -> None: ...
    @property
    def idle_servers(self) -> list[Any]:
        """The servers that nobody uses."""
    @property
    def idle_count(self) -> int:
        """How many servers nobody uses."""
    @property
    def waiting_clients(self) -> list[Any]:
        """The clients that wait for a server, the first first."""
    @property
    def waiting_count(self) -> int:
        """How many clients wait for a server."""
    def withdraw(self, server: Connection) -> bool:
        """Take one particular server out of the idle ones; tell if it was there."""
    def take_idle(self) -> Any:
        """Take an idle server for a use of the proxy's own, or None."""
    async def next_idle(self) -> Any:
        """Wait for a server for a use of the proxy's own, before all clients."""
    def wanted(self) -> None:
        """A client waits and no server is idle: open one where that is allowed."""
    def settings_changed(self, text: bytes) -> frozenset[str] | None:
        """The names of the settings that a text may change; None for any."""
    def may_reset(self, text: bytes) -> bool:
        """Whether a text may set something to its default."""
    def named_statements(self, text: bytes) -> Any:
        """Which prepared statements PREPARE and the like name in a query."""
    def question(self, server: Any, client: Any, flags: int) -> bytes | None:
        """A query that tells what session state there is, or None."""
    def answered(self, server: Any, client: Any, row: bytes | None) -> None:
        """Take the answer; None when there was an error."""
    def reset_message(self, flags: int) -> bytes | None:
        """The query that takes this state from a server; None if nothing can."""
