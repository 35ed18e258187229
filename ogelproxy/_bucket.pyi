from typing import Final, final

ENFORCE: Final[int]
WARN: Final[int]
OFF: Final[int]

@final
class TokenBucket:
    """Tokens that come in at `rate` per second, up to `capacity`; born full.

    In mode ENFORCE, over every window of length d at most
    ``capacity + rate * d`` tokens are taken and kept, whatever `now` does;
    a window in which rate or capacity change is bounded by the larger ones.
    `now` is seconds of a monotonic clock. Raises ValueError for a rate or
    capacity that is negative or not finite.
    """

    @property
    def rate(self) -> float:
        """Tokens per second."""
    @property
    def capacity(self) -> float:
        """Tokens in a full bucket."""
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
    def __new__(cls, rate: float, capacity: float, now: float) -> TokenBucket: ...
    def take(self, now: float, count: int) -> float:
        """Take `count` tokens, or none.

        Returns 0.0 when they were taken; otherwise the seconds until they will
        be there if nobody else takes any, infinite when they never will.
        In mode WARN those seconds are negative: nothing was taken, the query
        passes, and its client should be told.
        """
    def refund(self, count: int) -> None:
        """Give back `count` tokens taken for queries that were not sent."""
    def configure(self, rate: float, capacity: float, now: float) -> None:
        """Change the limit from `now` on.

        A higher one grants nothing for the time before; the level is never
        above the new capacity. Raises ValueError as the constructor does.
        """
    def is_full(self, now: float) -> bool:
        """Whether a new bucket in its place would be no different."""
