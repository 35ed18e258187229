from collections import OrderedDict
from typing import Final, Protocol, final

ENFORCE: Final[int]
WARN: Final[int]
OFF: Final[int]

class Keeper(Protocol):
    """What a bucket asks of the limiter."""

    def ask(self, bucket: TokenBucket) -> None:
        """Ask the lender for tokens, by `TokenBucket.ask` and `answer` or `fail`."""
    def wake(self, bucket: TokenBucket, wait: float) -> None:
        """Call `TokenBucket.serve` in `wait` seconds, in place of an earlier wish."""

class Waiter(Protocol):
    """Who waits in the queue of a bucket."""

    def grant(self, count: int) -> None:
        """End the wait: `count` tokens were taken for it."""
    def retry(self) -> None:
        """End the wait: take again, and see."""
    def wait_until(self, now: float) -> float:
        """Return when its wait has to end, in the bucket's seconds."""

@final
class TokenBucket:
    """Tokens that come in at `rate` per second, up to `capacity`.

    Without leases it is born full and mints them itself: in mode ENFORCE, over
    every window of length d at most ``capacity + rate * d`` tokens are taken and
    kept, whatever `now` does; a window in which rate or capacity change is bounded
    by the larger ones. With leases it is born empty and holds what a lender grants:
    a chunk of tokens, and a trickle, the right to mint at some rate; both are void
    at their end, which is looked at before each spend. Beside that it may mint the
    floor that was set.

    `now` is seconds of a monotonic clock. Raises ValueError for a rate or
    capacity that is negative or not finite.
    """

    @property
    def rate(self) -> float:
        """Tokens per second, of the tenant in all processes."""
    @property
    def capacity(self) -> float:
        """Tokens in the tenant's full bucket."""
    @property
    def level(self) -> float:
        """Tokens there were at `stamp`."""
    @property
    def stamp(self) -> float:
        """The latest time seen, seconds."""
    mode: int
    """ENFORCE, WARN (let pass, and tell) or OFF (cost nothing, count nothing)."""
    max_wait: float
    """Seconds a query may wait for tokens before it is refused."""
    @property
    def admitted(self) -> int:
        """Tokens taken and not given back."""
    @property
    def refused(self) -> int:
        """Tokens asked for in vain; a query that waits and asks twice, twice."""
    @property
    def warned(self) -> int:
        """Tokens that were lacking in mode WARN."""
    @property
    def is_leased(self) -> bool:
        """Whether it holds what a lender grants."""
    @property
    def must_ask(self) -> bool:
        """Whether the latest `take` failed for want of a lease that may be had.

        Then it was not counted as refused: `join` the queue, which asks, and take
        again when told.
        """
    @property
    def is_asking(self) -> bool:
        """Whether the lender was asked and did not answer yet."""
    @property
    def dry_until(self) -> float:
        """When the lender may be asked again in earnest, seconds."""
    @property
    def demand(self) -> float:
        """Tokens per second that were wanted lately, had or not."""
    @property
    def queue(self) -> OrderedDict[Waiter, int]:
        """Who waits, first come first, and for how many tokens."""
    def __new__(
        cls,
        rate: float,
        capacity: float,
        now: float,
        keeper: Keeper | None = None,
        *,
        is_leased: bool = False,
    ) -> TokenBucket: ...
    def level_at(self, now: float) -> float:
        """Return how many tokens are here now: minted, and leased."""
    def take(self, now: float, count: int) -> float:
        """Take `count` tokens, or none.

        Returns 0.0 when they were taken; otherwise the seconds until they will
        be there, behind those who wait already, if nobody else takes any; infinite
        when they never will. In mode WARN those seconds are negative: nothing was
        taken, the query passes, and its client should be told. With leases see
        `must_ask` first.
        """
    def refund(self, count: int) -> None:
        """Give back `count` tokens taken for queries that were not sent.

        Those of a lease that can't be proven to be still its own are lost.
        """
    def configure(self, rate: float, capacity: float, now: float) -> None:
        """Change the limit from `now` on.

        A higher one grants nothing for the time before; the level is never
        above the new capacity. What was leased stays until its end. Raises
        ValueError as the constructor does.
        """
    def is_full(self, now: float) -> bool:
        """Whether a new bucket in its place would be no different."""
    def set_floor(
        self, rate: float, capacity: float, since: float, until: float
    ) -> None:
        """Let a leased bucket mint so much without asking, between these times."""
    def ask(self, now: float) -> tuple[float, float, float, float, float]:
        """End the trickle and begin to ask.

        Returns the leased tokens held, the tokens lacking for who is first, the
        tokens per second that were wanted lately, the tokens that the latest trickle
        minted, and those given back because nobody wanted them.
        """
    def answer(
        self,
        now: float,
        *,
        chunk: float,
        dropped: float,
        chunk_until: float,
        trickle_rate: float,
        trickle_capacity: float,
        trickle_until: float,
        dry_until: float,
    ) -> None:
        """Take in what the lender granted, and serve who waits.

        `dropped` of the tokens held are no longer known to the lender.
        """
    def fail(self, now: float, dry_until: float) -> None:
        """Do without an answer until then."""
    def join(self, client: Waiter, count: int, now: float) -> None:
        """Wait for tokens, behind those who wait already."""
    def leave(self, client: Waiter) -> None:
        """Wait no more; nothing happens to who doesn't."""
    def serve(self, now: float, *, has_changed: bool = False) -> None:
        """Take tokens for those who wait, as far as there are any.

        With `has_changed`, when rates or leases are others now, those who can't
        wait as long as it takes are sent back to try again.
        """
