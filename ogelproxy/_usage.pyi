from os import PathLike
from typing import final

@final
class Attribution:
    """Who pays for a query: organisation, database, application, tier.

    `organisation` is the id's 16 bytes; `work_mem_bytes` enters the memory
    estimate. Texts are cut to the file's fields (64 bytes; handle 60, tier 32,
    type 16) between characters. Raises ServerBusy when the table has no room for one
    more; the room comes back when the object is gone and its batch closed.
    """

    def __new__(
        cls,
        table: UsageTable,
        organisation: bytes,
        *,
        handle: str,
        database: str,
        database_type: str,
        tier: str,
        application_name: str,
        work_mem_bytes: float,
    ) -> Attribution: ...

@final
class UsageTable:
    """Counters per payer and fingerprint, stored in the open batch file.

    Compiled code counts through ``count(who, measure)``. Without a batch, before
    the first `rotate` and after `close`, counting does nothing.

    Each row keeps, next to plain sums, two estimates. With ``duration`` the
    server's seconds (waiting in our queues is not billed):

    - vCPU seconds: duration x complexity x parallelism; parallelism is 2 when
      the query moved more than 1000 rows, else 1.
    - memory GiB seconds: duration x (`work_mem` + bytes returned) / 2**30.

    Divided by 3600 they are the hours of the invoice.
    """

    def __new__(cls, max_rows: int) -> UsageTable: ...
    @property
    def file_bytes(self) -> int:
        """Size that a batch file must have."""

    @property
    def used_bytes(self) -> int:
        """Length of the open batch up to its last slot in use."""

    @property
    def batch(self) -> int:
        """Number of the open batch; 0 while there is none."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted in the open batch."""

    @property
    def is_full(self) -> bool:
        """Whether an eighth or less is free, so that the batch should be closed."""

    def rotate(self, path: str | PathLike[str]) -> int:
        """Count into the batch file at `path` from now on.

        Returns the bytes in use of the file it left. Raises OSError, or
        SpoolUnusable for a file of another shape or a number that is not higher
        than any before; the table then stays as it was.
        """

    def close(self) -> int:
        """Leave the open batch without another; returns its bytes in use."""

    def record(
        self,
        who: Attribution,
        *,
        fingerprint: int = 0,
        complexity: int = 100,
        queries: int = 1,
        refused: int = 0,
        sqlstate: bytes | None = None,
        rows: int = 0,
        bytes_in: int = 0,
        bytes_out: int = 0,
        server_seconds: float = 0.0,
        queue_seconds: float = 0.0,
        throttled_seconds: float = 0.0,
    ) -> None:
        """Count from Python what compiled code counts by ``count``.

        `complexity` is in hundredths; `sqlstate`, five bytes, says that the
        server answered with an error. Fingerprint 0 is "not told apart".
        """

    def sums(self, organisation: bytes) -> list[tuple[bytes, bytes]]:
        """Return what the open batch holds of an organisation, its id's 16 bytes.

        A pair for each payer that used something: its record, and the sum of its
        rows in the form of a row.
        """

    def longest(self, organisation: bytes, count: int) -> list[tuple[bytes, bytes]]:
        """Return the rows with the longest single query, the longest first.

        At most `count` pairs of a payer's record and a row with a fingerprint.
        """
