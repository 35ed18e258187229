"""Events: who did what when (audit), and what tenants met (analytics).

Owns what an event is and its places in the control plane: `PostgresEvents` stores
those of proxies, `Outbox` hands on those that operators' acts left there. How an
event gets from here to a sink is `journal`'s; MongoDB is `mongodb`'s.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import orjson

from ogelproxy.usage.sinks import PRUNE_INTERVAL, PRUNE_ROWS

logger = logging.getLogger(__name__)

#: Events that are handed on at once.
FORWARDED_AT_ONCE = 500

ENTER = """
INSERT INTO platform.events (key, kind, at, actor, action, org_id, details)
SELECT * FROM unnest(
    $1::text[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::uuid[],
    $7::jsonb[])
ON CONFLICT (key) DO NOTHING
"""

PRUNE = """
DELETE FROM platform.events
 WHERE id = ANY (ARRAY(
    SELECT id FROM platform.events
     WHERE kind = 'analytics' AND at < now() - make_interval(days => $1) LIMIT $2))
"""

WAITING = """
SELECT id, key, kind, at, actor, action, org_id, details FROM platform.events
 WHERE forwarded_at IS NULL ORDER BY id LIMIT $1
"""

FORWARDED = "UPDATE platform.events SET forwarded_at = now() WHERE id = ANY($1::int8[])"


class EventKind(StrEnum):
    """What an event is for."""

    AUDIT = "audit"
    ANALYTICS = "analytics"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened once. `key` never changes and never comes twice."""

    key: str
    kind: EventKind
    at: float  # Unix time
    actor: str
    action: str  # subject and verb, as in ``organization.suspend``
    org_id: UUID | None  # None: it concerns no organisation, or all
    details: Mapping[str, Any]  # JSON

    def dump(self) -> bytes:
        """Return it as a line of JSON."""
        # str: the driver's UUIDs are of a subclass, which orjson does not take.
        return orjson.dumps(self, str, orjson.OPT_APPEND_NEWLINE)


def load(line: bytes) -> Event:
    """Read what `Event.dump` wrote. Raises ValueError."""
    try:
        fields = orjson.loads(line)
        org_id = fields["org_id"]
        return Event(
            key=str(fields["key"]),
            kind=EventKind(fields["kind"]),
            at=float(fields["at"]),
            actor=str(fields["actor"]),
            action=str(fields["action"]),
            org_id=None if org_id is None else UUID(org_id),
            details=dict(fields["details"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {error}") from error


class EventSink(Protocol):
    """Stores events."""

    async def record(self, events: Sequence[Event]) -> None:
        """Store the events for good, each once, however often it is given.

        Any exception means that some may not be stored; all will be given again.
        """


class Connection(Protocol):
    """What is used of an asyncpg connection."""

    async def execute(self, query: str, *args: Any) -> str: ...

    async def fetch(self, query: str, *args: Any) -> list[Any]: ...


class Pool(Protocol):
    """What is used of an asyncpg pool."""

    def acquire(self) -> AbstractAsyncContextManager[Connection]: ...


class PostgresEvents:
    """``platform.events``: the audit for ever, analytics for `history_days`."""

    def __init__(
        self,
        pool: Pool,
        history_days: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._history_days = history_days
        self._clock = clock
        self._pruned_at: float | None = None

    async def record(self, events: Sequence[Event]) -> None:
        """Enter the events that are not there yet."""
        columns = [
            [event.key for event in events],
            [event.kind.value for event in events],
            [_moment(event.at) for event in events],
            [event.actor for event in events],
            [event.action for event in events],
            [event.org_id for event in events],
            [orjson.dumps(event.details, str).decode() for event in events],
        ]
        async with self._pool.acquire() as connection:
            await connection.execute(ENTER, *columns)
            now = self._clock()
            if self._pruned_at is None or now - self._pruned_at >= PRUNE_INTERVAL:
                self._pruned_at = now
                await self._prune(connection)

    async def _prune(self, connection: Connection) -> None:
        # The events are stored already: they must not come again for this.
        try:
            await connection.execute(PRUNE, self._history_days, PRUNE_ROWS)
        except Exception as error:
            logger.warning("old analytics events were not removed: %s", error)


class LoggedEvents:
    """For an engine without a control plane: events are lines of the log."""

    async def record(self, events: Sequence[Event]) -> None:
        """Log the events."""
        for event in events:
            logger.info("%s: %s", event.kind, event.dump().decode().rstrip())


class Outbox:
    """Events that were left in the control plane, on their way to another sink.

    Operators' commands and the schema's triggers leave them in the transaction of
    what they tell of. Proxies that hand on the same ones at once do no harm.
    """

    def __init__(self, pool: Pool, sink: EventSink) -> None:
        self._pool = pool
        self._sink = sink

    async def forward(self) -> None:
        """Hand on all that wait."""
        while True:
            async with self._pool.acquire() as connection:
                rows = await connection.fetch(WAITING, FORWARDED_AT_ONCE)
            if not rows:
                return
            await self._sink.record([_event(row) for row in rows])
            async with self._pool.acquire() as connection:
                await connection.execute(FORWARDED, [row["id"] for row in rows])


def _event(row: Mapping[str, Any]) -> Event:
    return Event(
        key=row["key"],
        kind=EventKind(row["kind"]),
        at=row["at"].timestamp(),
        actor=row["actor"],
        action=row["action"],
        org_id=row["org_id"],
        details=orjson.loads(row["details"]),
    )


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
