from typing import final

@final
class Statement:
    """A prepared statement shared by the clients of one pool."""

    server_name: bytes
    body: bytes
    fingerprint: int
    complexity: int
    flags: int
    is_free: bool
    is_sql: bool

@final
class StatementCache:
    """The statements of one pool by their text, bounded in bytes."""

    bytes_kept: int
    def __init__(self, max_bytes: int) -> None: ...
    def __len__(self) -> int: ...

@final
class Naming:
    """What one message changed about a client's name; seen by compiled code only."""

@final
class Rewriting:
    """What a query that names statements became; seen by compiled code only."""
