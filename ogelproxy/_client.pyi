from typing import Any

from ogelproxy._bucket import TokenBucket
from ogelproxy._flights import Flights
from ogelproxy._loan import Borrower
from ogelproxy._pool import PoolCore, Settings
from ogelproxy._traffic import Traffic
from ogelproxy._usage import Attribution, UsageTable

class ClientCore(Borrower):
    """One client's requests on their way to a server."""

    host: Any
    session: Any
    pool: Any
    bucket: TokenBucket
    phase: int
    wait: float
    waiting_since: float
    active_at: float
    def start(
        self,
        host: Any,
        pool: PoolCore,
        settings: Settings,
        bucket: TokenBucket,
        who: Attribution,
        usage: UsageTable,
        traffic: Traffic,
        flights: Flights,
    ) -> None:
        """Leave the login: from here on compiled callbacks carry the client."""
    @property
    def is_idle(self) -> bool:
        """Whether nothing of it would be lost by ending it now."""
    @property
    def is_in_transaction(self) -> bool:
        """Whether it holds a server inside a transaction."""
    @property
    def is_waiting(self) -> bool:
        """Whether it waits for a server, a token or others of its organisation."""
    @property
    def is_crowded(self) -> bool:
        """Whether it waits for others of its organisation."""
    @property
    def is_lingering(self) -> bool:
        """Whether it was told why it ends and has still to close."""
    @property
    def is_logging_in(self) -> bool:
        """Whether a coroutine owns it."""
    def retry(self) -> None:
        """End the wait for a token: try the query again."""
    def grant(self, count: int) -> None:
        """End the wait for tokens: `count` were taken for it."""
    def wait_until(self, now: float) -> float:
        """When the wait for tokens that began, or begins `now`, has to end.

        In monotonic seconds: after `max_wait`, or `limits.transaction_wait` inside
        a transaction.
        """
    def give_up(self, error: bytes) -> None:
        """Answer the query that waits with an ErrorResponse."""
    def fail(self, message: bytes) -> None:
        """Send an ErrorResponse, then end the connection."""
    def abort(self) -> None:
        """Close at once."""
