"""Where closed batches go: the Sink protocol and its two plain members.

A sink may be given the same batch again, after a crash between its commit and
the removal of the file, and must then change nothing: batches and rows have ids
that never change. Sinks know no files and no table; `Meter` retries for them.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

from ogelproxy.usage.spool import Batch, Row

logger = logging.getLogger(__name__)

HOUR = 3600

#: Seconds between tries of a sink that fails: doubled each time up to the last,
#: and drawn from the upper half so that nodes don't come back in step.
FIRST_RETRY_INTERVAL = 0.25
LAST_RETRY_INTERVAL = 30.0

#: Seconds between two looks for history that is too old, and rows taken away at
#: once: short transactions, so that nothing else waits for them.
PRUNE_INTERVAL = 60.0
PRUNE_ROWS = 10_000

# Delivered numbers are a set that folds neighbours, so that a node costs one
# short row for ever, however many batches it sent. No row returned: seen before.
ENTER = """
INSERT INTO platform.usage_nodes AS known (node, delivered)
VALUES ($1, int8multirange(int8range($2::int8, $2::int8 + 1)))
ON CONFLICT (node) DO UPDATE
   SET delivered = known.delivered + excluded.delivered, seen_at = now()
 WHERE NOT known.delivered @> $2::int8
RETURNING true
"""

HISTORY = """
INSERT INTO platform.usage_history (
    node, batch, slot, org_id, handle, tier, database, database_type,
    application_name, fingerprint, queries, refused, errors, sqlstate, rows,
    bytes_in, bytes_out, server_seconds, queue_seconds, throttled_seconds,
    vcpu_seconds, memory_gib_seconds, longest_seconds, first_at, last_at)
SELECT $1, $2, part.*
  FROM unnest(
    $3::int[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[],
    $9::text[], $10::int8[], $11::int8[], $12::int8[], $13::int8[], $14::text[],
    $15::int8[], $16::int8[], $17::int8[], $18::float8[], $19::float8[],
    $20::float8[], $21::float8[], $22::float8[], $23::float8[],
    $24::timestamptz[], $25::timestamptz[]) AS part
"""

# Sorted, so that two nodes which update the same hours can't deadlock. Organisations
# are not looked up: what a deleted one used is entered like any other's.
ROLL_UP = """
INSERT INTO platform.usage_metrics AS total (
    org_id, database_type, period_start, period_end, vcpu_hours,
    memory_gb_hours, query_count, rows, bytes)
SELECT org_id, database_type, period_start, period_start + interval '1 hour',
       vcpu_hours, memory_gb_hours, query_count, rows, bytes
  FROM unnest(
    $1::uuid[], $2::text[], $3::timestamptz[], $4::float8[], $5::float8[],
    $6::int8[], $7::int8[], $8::int8[])
    AS part (org_id, database_type, period_start, vcpu_hours, memory_gb_hours,
             query_count, rows, bytes)
 ORDER BY org_id, database_type, period_start
ON CONFLICT (org_id, database_type, period_start) DO UPDATE
   SET vcpu_hours = total.vcpu_hours + excluded.vcpu_hours,
       memory_gb_hours = total.memory_gb_hours + excluded.memory_gb_hours,
       query_count = total.query_count + excluded.query_count,
       rows = total.rows + excluded.rows,
       bytes = total.bytes + excluded.bytes
"""

PRUNE = """
DELETE FROM platform.usage_history
 WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM platform.usage_history
     WHERE first_at < now() - make_interval(days => $1) LIMIT $2))
"""


def retry_interval(failures: int) -> float:
    """Return the seconds until the next try, when so many in a row failed."""
    doubled = FIRST_RETRY_INTERVAL * 2.0 ** min(failures - 1, 16)
    return min(doubled, LAST_RETRY_INTERVAL) * random.uniform(0.5, 1.0)


class Sink(Protocol):
    """Takes closed batches."""

    async def deliver(self, batch: Batch) -> None:
        """Store `batch` for good, once, however often it is given.

        Any exception means that it may not be stored, and will be given again.
        Batches come one at a time, oldest first.
        """


class Connection(Protocol):
    """What `PostgresSink` needs of an asyncpg connection."""

    def transaction(self) -> AbstractAsyncContextManager[object]: ...

    async def execute(self, query: str, *args: Any) -> str: ...

    async def fetchval(self, query: str, *args: Any) -> Any: ...


class Pool(Protocol):
    """What `PostgresSink` needs of an asyncpg pool."""

    def acquire(self) -> AbstractAsyncContextManager[Connection]: ...


class PostgresSink:
    """The control plane's Postgres: history per batch, totals per hour.

    `history_days` is how long rows of ``platform.usage_history`` are kept; the
    totals in ``platform.usage_metrics`` stay. Where another sink has the history,
    `keeps_history` is False, and only what was entered before is kept so long.
    """

    def __init__(
        self,
        pool: Pool,
        history_days: int,
        *,
        keeps_history: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._history_days = history_days
        self._keeps_history = keeps_history
        self._clock = clock
        self._pruned_at: float | None = None

    async def deliver(self, batch: Batch) -> None:
        """Enter the batch, its rows and its totals in one transaction."""
        async with self._pool.acquire() as connection:
            async with connection.transaction():
                if await connection.fetchval(ENTER, batch.node, batch.number):
                    if self._keeps_history:
                        await connection.execute(HISTORY, *_history(batch))
                    await connection.execute(ROLL_UP, *_totals(batch))
            now = self._clock()
            if self._pruned_at is None or now - self._pruned_at >= PRUNE_INTERVAL:
                self._pruned_at = now
                await self._prune(connection)

    async def _prune(self, connection: Connection) -> None:
        # The batch is stored already: it must not come again for this.
        try:
            await connection.execute(PRUNE, self._history_days, PRUNE_ROWS)
        except Exception as error:
            logger.warning("old usage history was not removed: %s", error)


class MemorySink:
    """Keeps the latest `max_batches` in memory, for embedders and tests."""

    def __init__(self, max_batches: int = 1000) -> None:
        self._max_batches = max_batches
        self._batches: OrderedDict[str, Batch] = OrderedDict()

    async def deliver(self, batch: Batch) -> None:
        """Keep the batch, forgetting the oldest when there are too many."""
        self._batches.setdefault(batch.id, batch)
        while len(self._batches) > self._max_batches:
            self._batches.popitem(last=False)

    @property
    def batches(self) -> list[Batch]:
        """The batches kept, oldest first."""
        return list(self._batches.values())

    @property
    def rows(self) -> list[Row]:
        """The rows of all batches kept."""
        return [row for batch in self.batches for row in batch.rows]


def _signed(fingerprint: int) -> int:
    """Return the same 64 bits as Postgres's bigint, which has a sign."""
    return fingerprint - (1 << 64) if fingerprint >> 63 else fingerprint


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _history(batch: Batch) -> list[Any]:
    columns = [
        [row.slot for row in batch.rows],
        [row.payer.org_id for row in batch.rows],
        [row.payer.handle for row in batch.rows],
        [row.payer.tier for row in batch.rows],
        [row.payer.database for row in batch.rows],
        [row.payer.database_type for row in batch.rows],
        [row.payer.application_name for row in batch.rows],
        [_signed(row.fingerprint) for row in batch.rows],
        [row.queries for row in batch.rows],
        [row.refused for row in batch.rows],
        [row.errors for row in batch.rows],
        [row.sqlstate or None for row in batch.rows],
        [row.rows for row in batch.rows],
        [row.bytes_in for row in batch.rows],
        [row.bytes_out for row in batch.rows],
        [row.server_seconds for row in batch.rows],
        [row.queue_seconds for row in batch.rows],
        [row.throttled_seconds for row in batch.rows],
        [row.vcpu_seconds for row in batch.rows],
        [row.memory_gib_seconds for row in batch.rows],
        [row.longest_seconds for row in batch.rows],
        [_moment(row.first_at) for row in batch.rows],
        [_moment(row.last_at) for row in batch.rows],
    ]
    return [batch.node, batch.number, *columns]


def _totals(batch: Batch) -> list[list[Any]]:
    """Sum the batch by organisation, type and hour, as columns for `ROLL_UP`.

    Hours are the seconds of `Row` / 3600. A row counts in the hour it began in;
    `Meter` closes batches with the hour.
    """
    sums: defaultdict[tuple[UUID, str, float], list[float]] = defaultdict(
        lambda: [0.0, 0.0, 0, 0, 0]
    )
    for row in batch.rows:
        hour = row.first_at // HOUR * HOUR
        total = sums[row.payer.org_id, row.payer.database_type, hour]
        total[0] += row.vcpu_seconds / HOUR
        total[1] += row.memory_gib_seconds / HOUR
        total[2] += row.queries
        total[3] += row.rows
        total[4] += row.bytes_in + row.bytes_out
    return [
        [org_id for org_id, _, _ in sums],
        [database_type for _, database_type, _ in sums],
        [_moment(hour) for _, _, hour in sums],
        *([total[column] for total in sums.values()] for column in range(5)),
    ]
