from collections.abc import Iterable
from enum import IntEnum, IntFlag
from typing import NamedTuple

class Kind(IntEnum):
    """The leading keyword of the first statement, similar ones under one name."""

    EMPTY = 0
    OTHER = 1
    BEGIN = 2
    COMMIT = 3
    ROLLBACK = 4
    SAVEPOINT = 5
    SET = 6
    SHOW = 7
    COPY = 8
    SELECT = 9
    INSERT = 10
    UPDATE = 11
    DELETE = 12
    MERGE = 13
    PREPARE = 14
    EXECUTE = 15
    DEALLOCATE = 16
    DECLARE = 17
    FETCH = 18
    CLOSE = 19
    LISTEN = 20
    NOTIFY = 21
    DISCARD = 22
    LOAD = 23
    LOCK = 24
    CALL = 25
    EXPLAIN = 26
    DDL = 27
    MAINTAIN = 28

class Flag(IntFlag):
    """Session state that some statement may make or end."""

    TEMP = 1
    LISTEN = 2
    UNLISTEN = 4
    ADVISORY = 8
    ADVISORY_UNLOCK = 16
    HOLD = 32
    CLOSE = 64
    PREPARE = 128
    EXECUTE = 256
    DEALLOCATE = 512
    LOAD = 1024
    SET = 2048
    SET_LOCAL = 4096
    SET_CONFIG = 8192
    DISCARD = 16384
    ROLE = 32768
    TRANSACTION = 65536
    DDL = 131072
    PREPARED_XACT = 262144
    COPY = 524288
    ANY_SETTING = 1048576
    SEQUENCE = 2097152
    SEED = 4194304
    OPAQUE = 8388608

class ScanResult(NamedTuple):
    """What one scan found."""

    fingerprint: int
    """64-bit hash of the normalised text, the same in every process, never 0."""
    statements: int
    """Statements that are not empty."""
    free_statements: int
    """Of them COMMIT, END, ROLLBACK, ABORT and ROLLBACK TO."""
    complexity: int
    """Hundredths, 100 to 2000, of the heaviest statement.

    100, and for each JOIN, LATERAL and sub-select 50; OVER 60; GROUP BY 40;
    ORDER BY, DISTINCT, UNION, INTERSECT and EXCEPT 30; HAVING 10; WITH
    RECURSIVE, CALL, DO and DDL 100; VACUUM, ANALYZE, REINDEX, CLUSTER, REFRESH
    and CHECKPOINT 200.
    """
    flags: Flag
    kind: Kind

def scan(sql: bytes, cuts: Iterable[int] = ()) -> ScanResult:
    """Scan `sql`, fed in pieces cut at the ascending offsets `cuts`.

    Raises ValueError for an offset outside of `sql` or before the one before.
    """

def fingerprint(sql: bytes | str) -> int:
    """Return the 64-bit hash of `sql` with literals and spelling folded."""
