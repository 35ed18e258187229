from typing import final

@final
class Traffic:
    """The queries of one tier and database type, in numbers that only grow.

    `seconds` is the sum of latencies; `delayed`, `refused` and `warned` count
    queries that met the rate limit.
    """

    tier: str
    database_type: str
    seconds: float
    bytes_in: int
    bytes_out: int
    delayed: int
    refused: int
    warned: int
    def __init__(self, tier: str, database_type: str) -> None: ...
    @property
    def buckets(self) -> list[int]:
        """Answered queries per bucket of LATENCY_BOUNDS, not cumulative."""
