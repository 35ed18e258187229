from typing import final

@final
class Traffic:
    """The queries of one target and tier, in numbers that only grow.

    `seconds` is the sum of latencies, `query_seconds` the servers' part of it;
    `wait_seconds` is how long clients waited for servers. `delayed`, `refused` and
    `warned` count queries that met the rate limit, `flight_waits` those that waited
    for others of their organisation in flight. Parses are of named statements.
    """

    tier: str
    database_type: str
    logins: int
    loans: int
    queries: int
    transactions: int
    client_parses: int
    server_parses: int
    binds: int
    query_seconds: float
    transaction_seconds: float
    wait_seconds: float
    seconds: float
    bytes_in: int
    bytes_out: int
    delayed: int
    refused: int
    warned: int
    flight_waits: int
    def __init__(self, tier: str, database_type: str) -> None: ...
    @property
    def buckets(self) -> list[int]:
        """Answered queries per bucket of LATENCY_BOUNDS, not cumulative."""
    def add(self, other: Traffic) -> None:
        """Add all numbers of another."""
