from typing import Any

from ogelproxy._flights import Flying
from ogelproxy._pool import PoolCore, Pooled, Settings
from ogelproxy._reactor import Reactor

class Borrower(Flying):
    """What a server knows of the client that it is lent to."""

    pool: Any
    server: Any
    startup: Settings
    settings: Settings
    touched: frozenset[str] | None
    held_by: int

class Lendable(Pooled):
    """A server connection as loans see it."""

    host: Any
    pool: Any
    client: Any
    phase: int
    question: Any
    had_error: bool
    idle_since: float
    opened_at: float
    expires_at: float
    epoch: int
    cancels: int
    is_retiring: bool
    process_id: int
    cancel_key: bytes
    def __init__(
        self, reactor: Reactor, fd: int, host: Any, pool: PoolCore
    ) -> None: ...
    @property
    def transaction_status(self) -> str:
        """`I` idle, `T` in a transaction, `E` in a failed one (manual 55.7)."""
    @property
    def owed(self) -> int:
        """How many replies are still to come."""
    def enter_pool(self) -> None:
        """Begin its life in the pool, logged in; hand it to who waits."""
    def land(self) -> None:
        """It has ended what it did for a client that is gone."""
    def cancel_done(self) -> None:
        """A cancel request to it has ended."""
