"""MongoHistory, MongoSink: usage history and events in MongoDB, each thing once.

Three plain collections, `usageHistory`, `auditLogs` and `analyticsEvents`, whose
documents have ids that never change: what comes again meets its duplicate, which
is as good as stored. Knows no spool and no billing totals; those stay with the
control plane. docs/usage.md describes the documents.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

# `from pymongo import AsyncMongoClient` speaks alike but for `close`, a coroutine.
from motor.motor_asyncio import AsyncIOMotorClient as AsyncMongoClient
from pymongo import IndexModel, WriteConcern
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)

from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, HistoryUnavailable
from ogelproxy.tenants.model import DatabaseType, UsageTotal
from ogelproxy.usage.events import Event, EventKind
from ogelproxy.usage.sinks import HOUR
from ogelproxy.usage.spool import Batch, Row

logger = logging.getLogger(__name__)

Document = dict[str, Any]

USAGE = "usageHistory"
AUDIT = "auditLogs"
ANALYTICS = "analyticsEvents"
COLLECTIONS = {EventKind.AUDIT: AUDIT, EventKind.ANALYTICS: ANALYTICS}

#: Of the database when the URL names none.
DATABASE = "ogelproxy"
SCHEMES = ("mongodb://", "mongodb+srv://")

#: Milliseconds to find a server, and for one operation with all its retries.
SELECTION_TIMEOUT_MS = 5_000
OPERATION_TIMEOUT_MS = 10_000

#: Acknowledged is what survives the loss of any one machine, and a power cut.
DURABLE = WriteConcern("majority", j=True)

#: Documents made and sent before others get their turn in the loop.
ROWS_AT_ONCE = 500

DAY = 86_400
EXPIRY = "expiry"
DUPLICATE_KEY = 11000
AUTHENTICATION_FAILED = (18, 8000)  # MongoDB's code, and Atlas's


def indexes(history_days: int) -> Mapping[str, Sequence[IndexModel]]:
    """Return the indexes of each collection. The audit is kept for ever."""
    ttl = history_days * DAY
    return {
        USAGE: (
            IndexModel([("orgId", 1), ("startedAt", -1)], name="org_time"),
            IndexModel([("startedAt", 1)], name=EXPIRY, expireAfterSeconds=ttl),
        ),
        AUDIT: (
            IndexModel([("orgId", 1), ("at", -1)], name="org_time"),
            IndexModel([("at", -1)], name="time"),
        ),
        ANALYTICS: (
            IndexModel([("orgId", 1), ("at", -1)], name="org_time"),
            IndexModel([("at", 1)], name=EXPIRY, expireAfterSeconds=ttl),
        ),
    }


@dataclass(frozen=True, slots=True)
class HistoryVitals:
    """What a MongoDB says about itself; `doctor` asks."""

    version: str
    replica_set: str  # its name; empty for a server alone
    is_sharded: bool  # a router answers, which only leads to replica sets
    is_writable: bool
    missing: tuple[str, ...]  # indexes that are not as they should be


class MongoHistory:
    """One MongoDB database, to read. Made inside of a running loop; `close` ends it.

    Every method raises HistoryUnavailable, in one sentence, when MongoDB can't be
    reached, refuses, or doesn't answer in time. Raises ConfigInvalid for a
    malformed URL.
    """

    def __init__(self, url: Secret) -> None:
        text = url.get_secret_value()
        if not text.startswith(SCHEMES):
            raise ConfigInvalid(
                "usage.mongodb_url (MONGODB_URL) starts with " + " or ".join(SCHEMES)
            )
        try:
            self._client: Any = AsyncMongoClient(
                text,
                appname="ogelproxy",
                tz_aware=True,
                serverSelectionTimeoutMS=SELECTION_TIMEOUT_MS,
                timeoutMS=OPERATION_TIMEOUT_MS,
            )
            self._database = self._client.get_default_database(
                DATABASE, write_concern=DURABLE
            )
        except (ValueError, InvalidURI, ConfigurationError):
            # Without the reason, which could quote a part of the password.
            raise ConfigInvalid(
                "usage.mongodb_url (MONGODB_URL) is not a valid MongoDB URL"
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    async def fetch_history(
        self,
        org_id: UUID | None,
        since: datetime.datetime,
        until: datetime.datetime,
        limit: int,
    ) -> list[UsageTotal]:
        """Sum the history by database, application and statement, the costliest first.

        Of all organisations when `org_id` is None; rows that began in
        [since, until).
        """
        match: Document = {"startedAt": {"$gte": since, "$lt": until}}
        if org_id is not None:
            match["orgId"] = str(org_id)
        keys = ("handle", "database", "databaseType", "applicationName", "fingerprint")
        sums = ("queries", "refused", "errors", "rows", "bytesIn", "bytesOut")
        hours = ("serverSeconds", "vcpuHours", "memoryGbHours")
        group = {name: {"$sum": f"${name}"} for name in (*sums, *hours)}
        pipeline = [
            {"$match": match},
            {
                "$group": {
                    "_id": {key: f"${key}" for key in keys},
                    **group,
                    "longestSeconds": {"$max": "$longestSeconds"},
                    "lastAt": {"$max": "$endedAt"},
                }
            },
            {"$sort": {"serverSeconds": -1, "_id": 1}},
            {"$limit": limit},
        ]
        try:
            # As a command, and all of it in the first batch: cursors are what the
            # two drivers don't make alike.
            answer = await self._database.command(
                "aggregate",
                USAGE,
                pipeline=pipeline,
                cursor={"batchSize": limit},
                codec_options=self._database.codec_options,
            )
        except PyMongoError as error:
            raise _unavailable(error) from error
        return [_total(found) for found in answer["cursor"]["firstBatch"]]


class MongoSink(MongoHistory):
    """The same to write: indexes, batches and events; `history_days` are kept."""

    def __init__(self, url: Secret, history_days: int) -> None:
        super().__init__(url)
        self._history_days = history_days
        self._is_prepared = False  # the indexes are there
        # Of the batch that is under way: its id, and how many rows are stored, so
        # that a large one advances however often it is interrupted.
        self._batch = ""
        self._stored = 0

    async def deliver(self, batch: Batch) -> None:
        """Store the rows of `batch` in `usageHistory`, a part at a time."""
        await self._prepare()
        if batch.id != self._batch:
            self._batch, self._stored = batch.id, 0
        while self._stored < len(batch.rows):
            part = batch.rows[self._stored : self._stored + ROWS_AT_ONCE]
            await self._insert(USAGE, [_document(batch, row) for row in part])
            self._stored += len(part)

    async def record(self, events: Sequence[Event]) -> None:
        """Store the audit in `auditLogs`, the rest in `analyticsEvents`."""
        await self._prepare()
        for kind, name in COLLECTIONS.items():
            documents = [_event(event) for event in events if event.kind is kind]
            if documents:
                await self._insert(name, documents)

    async def fetch_vitals(self) -> HistoryVitals:
        """Ask the server what it is, and for its indexes."""
        missing: list[str] = []
        try:
            build = await self._database.command("buildInfo")
            hello = await self._database.command("hello")
            for name, models in indexes(self._history_days).items():
                known = await self._database[name].index_information()
                missing += [
                    f"{name}.{model.document['name']}"
                    for model in models
                    if not _is_like(known.get(model.document["name"]), model.document)
                ]
        except PyMongoError as error:
            raise _unavailable(error) from error
        return HistoryVitals(
            version=build["version"],
            replica_set=hello.get("setName", ""),
            is_sharded=hello.get("msg") == "isdbgrid",
            is_writable=bool(hello.get("isWritablePrimary")),
            missing=tuple(missing),
        )

    async def fetch_time(self) -> float:
        """Return its clock as Unix time, to the millisecond."""
        try:
            hello = await self._database.command("hello")
        except PyMongoError as error:
            raise _unavailable(error) from error
        time: float = hello["localTime"].timestamp()
        return time

    async def _insert(self, collection: str, documents: Sequence[Document]) -> None:
        """Store the documents; those that are there already stay as they are.

        For a duplicate, too, MongoDB waits until a majority has what was seen.
        """
        try:
            await self._database[collection].insert_many(documents, ordered=False)
        except BulkWriteError as error:
            refused = [
                each
                for each in (
                    *error.details["writeErrors"],
                    *error.details["writeConcernErrors"],
                )
                if not _is_duplicate(each)
            ]
            if refused:
                raise HistoryUnavailable(
                    f"MongoDB did not store {len(refused)} of {len(documents)} "
                    f"documents of {collection}: {refused[0].get('errmsg')}"
                ) from None
        except PyMongoError as error:
            raise _unavailable(error) from error

    async def _prepare(self) -> None:
        """Make the indexes, once; those that are there already stay."""
        if self._is_prepared:
            return
        try:
            for name, models in indexes(self._history_days).items():
                await self._prepare_collection(name, models)
        except OperationFailure as error:
            if error.code in AUTHENTICATION_FAILED:
                raise _unavailable(error) from error
            # Without the right to: what is written counts more than how fast it
            # is found.
            logger.error("MongoDB's indexes were not made: %s", _said(error))
        except PyMongoError as error:
            raise _unavailable(error) from error
        self._is_prepared = True

    async def _prepare_collection(
        self, name: str, models: Sequence[IndexModel]
    ) -> None:
        collection = self._database[name]
        known = await collection.index_information()
        for model in models:
            wanted = model.document
            there = known.get(wanted["name"], {}).get("expireAfterSeconds")
            if there not in (None, wanted.get("expireAfterSeconds")):
                # `usage.history_days` was changed. Not by collMod: the role
                # readWrite may not.
                await collection.drop_index(wanted["name"])
        await collection.create_indexes(list(models))


def _document(batch: Batch, row: Row) -> Document:
    payer = row.payer
    return {
        "_id": batch.row_id(row),
        "orgId": str(payer.org_id),
        "handle": payer.handle,
        "tier": payer.tier,
        "database": payer.database,
        "databaseType": payer.database_type,
        "applicationName": payer.application_name,
        "fingerprint": f"{row.fingerprint:016x}" if row.fingerprint else None,
        "startedAt": _moment(row.first_at),
        "endedAt": _moment(row.last_at),
        "queries": row.queries,
        "refused": row.refused,
        "errors": row.errors,
        "sqlstate": row.sqlstate or None,
        "rows": row.rows,
        "bytesIn": row.bytes_in,
        "bytesOut": row.bytes_out,
        "serverSeconds": row.server_seconds,
        "queueSeconds": row.queue_seconds,
        "throttledSeconds": row.throttled_seconds,
        "longestSeconds": row.longest_seconds,
        "vcpuHours": row.vcpu_seconds / HOUR,
        "memoryGbHours": row.memory_gib_seconds / HOUR,
    }


def _event(event: Event) -> Document:
    return {
        "_id": event.key,
        "orgId": None if event.org_id is None else str(event.org_id),
        "at": _moment(event.at),
        "actor": event.actor,
        "action": event.action,
        "details": dict(event.details),
    }


def _total(found: Document) -> UsageTotal:
    key = found["_id"]
    return UsageTotal(
        handle=key["handle"],
        database=key["database"],
        database_type=DatabaseType(key["databaseType"]),
        application_name=key["applicationName"],
        fingerprint=key.get("fingerprint"),
        queries=found["queries"],
        refused=found["refused"],
        errors=found["errors"],
        rows=found["rows"],
        bytes_in=found["bytesIn"],
        bytes_out=found["bytesOut"],
        server_seconds=found["serverSeconds"],
        longest_seconds=found["longestSeconds"],
        vcpu_hours=found["vcpuHours"],
        memory_gb_hours=found["memoryGbHours"],
        last_at=found["lastAt"],
    )


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _is_like(known: Document | None, wanted: Document) -> bool:
    """Say whether an index is there and expires what it should."""
    expiry = "expireAfterSeconds"
    return known is not None and known.get(expiry) == wanted.get(expiry)


def _is_duplicate(error: Document) -> bool:
    # Of our id: an index that somebody else made is another matter.
    is_id = error.get("keyPattern", {"_id": 1}) == {"_id": 1}
    return error.get("code") == DUPLICATE_KEY and is_id


def _unavailable(error: PyMongoError) -> HistoryUnavailable:
    return HistoryUnavailable(f"MongoDB gives no answer: {_said(error)}")


def _said(error: PyMongoError) -> str:
    """Return the error's kind and text without the driver's picture of the servers."""
    text = str(error).partition("(configured timeouts")[0].partition(", Timeout:")[0]
    return f"{type(error).__name__}: {text.partition(', full error:')[0].strip()}"
