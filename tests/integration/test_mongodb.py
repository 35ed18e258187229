"""History in MongoDB: once, whole, and through what goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, HistoryUnavailable
from ogelproxy.usage import Batch, Payer, Row
from ogelproxy.usage.mongodb import ROWS_AT_ONCE, MongoSink
from tests.fixtures.mongodb import Mongo

ORG = UUID(int=7)
#: Recent, or it would expire under the tests' eyes; BSON knows no microseconds.
NOW = datetime.now(UTC).replace(microsecond=0)
PAYER = Payer(ORG, "org_7", "pro", "postgres", "app", "psql é")
ROW = Row(
    slot=4,
    payer=PAYER,
    fingerprint=(1 << 64) - 5,
    queries=3,
    refused=1,
    errors=1,
    sqlstate="42601",
    rows=20,
    bytes_in=100,
    bytes_out=1 << 40,
    server_seconds=1.5,
    queue_seconds=0.25,
    throttled_seconds=0.125,
    vcpu_seconds=7200.0,
    memory_gib_seconds=1800.0,
    longest_seconds=1.0,
    first_at=NOW.timestamp(),
    last_at=NOW.timestamp() + 5,
)


def batch(node: UUID, number: int, *rows: Row) -> Batch:
    return Batch(node, number, NOW.timestamp(), rows)


@pytest.fixture
async def sink(mongodb: Mongo) -> AsyncIterator[MongoSink]:
    sink = MongoSink(Secret(mongodb.url), 30)
    yield sink
    sink.close()


async def test_a_row_becomes_one_document(sink: MongoSink, mongodb: Mongo) -> None:
    node = uuid4()
    await sink.deliver(batch(node, 1, ROW, replace(ROW, slot=5, fingerprint=0)))
    document, other = mongodb.documents("usageHistory")
    assert document == {
        "_id": f"{node}-1-4",
        "orgId": str(ORG),
        "handle": "org_7",
        "tier": "pro",
        "database": "app",
        "databaseType": "postgres",
        "applicationName": "psql é",
        "fingerprint": "fffffffffffffffb",
        "startedAt": NOW,
        "endedAt": NOW + timedelta(seconds=5),
        "queries": 3,
        "refused": 1,
        "errors": 1,
        "sqlstate": "42601",
        "rows": 20,
        "bytesIn": 100,
        "bytesOut": 1 << 40,
        "serverSeconds": 1.5,
        "queueSeconds": 0.25,
        "throttledSeconds": 0.125,
        "longestSeconds": 1.0,
        "vcpuHours": 2.0,
        "memoryGbHours": 0.5,
    }
    assert other["fingerprint"] is None


async def test_a_batch_that_comes_again_changes_nothing(
    sink: MongoSink, mongodb: Mongo
) -> None:
    node, other = uuid4(), uuid4()
    rows = [replace(ROW, slot=slot) for slot in range(10)]
    await sink.deliver(batch(node, 1, *rows[:4]))
    # As after a crash half-way: some of it is there.
    for _ in range(3):
        await sink.deliver(batch(node, 1, *rows))
        await sink.deliver(batch(other, 1, *rows))
    assert len(mongodb.documents("usageHistory")) == 20


async def test_a_batch_larger_than_a_part_is_stored_whole(
    sink: MongoSink, mongodb: Mongo
) -> None:
    count = 2 * ROWS_AT_ONCE + 7
    rows = [replace(ROW, slot=slot) for slot in range(count)]
    await sink.deliver(batch(uuid4(), 1, *rows))
    assert len(mongodb.documents("usageHistory")) == count


async def test_collections_are_indexed_by_organisation_and_expire(
    sink: MongoSink, mongodb: Mongo
) -> None:
    await sink.deliver(batch(uuid4(), 1, ROW))
    for name, time in (
        ("usageHistory", "startedAt"),
        ("auditLogs", "at"),
        ("analyticsEvents", "at"),
    ):
        found = mongodb.indexes(name)
        assert found["org_time"]["key"] == [("orgId", 1), (time, -1)]
        if name == "auditLogs":
            assert not any("expireAfterSeconds" in index for index in found.values())
        else:
            assert found["expiry"]["key"] == [(time, 1)]
            assert found["expiry"]["expireAfterSeconds"] == 30 * 86_400


async def test_a_changed_number_of_days_changes_the_index(
    sink: MongoSink, mongodb: Mongo
) -> None:
    await sink.deliver(batch(uuid4(), 1, ROW))
    later = MongoSink(Secret(mongodb.url), 7)
    await later.deliver(batch(uuid4(), 1, ROW))
    later.close()
    for name in ("usageHistory", "analyticsEvents"):
        expiry = mongodb.indexes(name)["expiry"]
        assert expiry["expireAfterSeconds"] == 7 * 86_400


async def test_a_document_that_is_refused_fails_its_batch_with_the_reason(
    sink: MongoSink, mongodb: Mongo
) -> None:
    mongodb.run(
        {"create": "usageHistory", "validator": {"rows": {"$lt": 100}}},
    )
    node = uuid4()
    bad = replace(ROW, slot=5, rows=100)
    with pytest.raises(HistoryUnavailable, match="did not store 1 of 2") as caught:
        await sink.deliver(batch(node, 1, ROW, bad))
    assert "validation" in str(caught.value)
    mongodb.run({"collMod": "usageHistory", "validator": {}})
    await sink.deliver(batch(node, 1, ROW, bad))
    assert len(mongodb.documents("usageHistory")) == 2


async def test_a_duplicate_of_something_else_is_no_success(
    sink: MongoSink, mongodb: Mongo
) -> None:
    mongodb.run(
        {
            "createIndexes": "usageHistory",
            "indexes": [{"key": {"handle": 1}, "name": "theirs", "unique": True}],
        }
    )
    with pytest.raises(HistoryUnavailable, match="did not store 1 of 2"):
        await sink.deliver(batch(uuid4(), 1, ROW, replace(ROW, slot=5)))


@pytest.mark.parametrize(
    "url",
    ["localhost:27017", "mongodb://u:se/cret@h/db", "mongodb://u:se:cret@h:port/db"],
)
async def test_a_malformed_url_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"usage\.mongodb_url") as caught:
        MongoSink(Secret(url), 30)
    assert "cret" not in str(caught.value)


async def test_who_is_not_there_is_named_in_a_sentence(own_mongodb: Mongo) -> None:
    own_mongodb.kill()
    url = own_mongodb.url.replace("mongodb://", "mongodb://user:pass@")
    sink = MongoSink(Secret(url), 30)
    try:
        with pytest.raises(HistoryUnavailable) as caught:
            await sink.deliver(batch(uuid4(), 1, ROW))
    finally:
        sink.close()
    text = str(caught.value)
    assert "127.0.0.1" in text and "refused" in text
    assert len(text) < 200 and "pass@" not in text


async def test_history_is_summed_by_program_and_statement(sink: MongoSink) -> None:
    old = (NOW - timedelta(days=2)).timestamp()
    slow = replace(ROW, slot=5, fingerprint=1, server_seconds=9.0, longest_seconds=8.0)
    theirs = replace(PAYER, org_id=UUID(int=8), handle="org_8")
    await sink.deliver(
        batch(
            uuid4(),
            1,
            ROW,
            slow,
            replace(ROW, slot=6, longest_seconds=2.0),
            replace(ROW, slot=7, payer=theirs),
            replace(ROW, slot=8, first_at=old),
            replace(ROW, slot=9, payer=replace(PAYER, application_name="other")),
        )
    )
    since, until = NOW - timedelta(days=1), NOW + timedelta(days=1)
    first, second, third = await sink.fetch_history(ORG, since, until, 10)
    assert (first.fingerprint, first.server_seconds) == ("0000000000000001", 9.0)
    assert (second.handle, second.database) == ("org_7", "app")
    assert (second.application_name, second.queries) == ("psql é", 6)
    assert (second.vcpu_hours, second.longest_seconds) == (4.0, 2.0)
    assert second.bytes_out == 1 << 41
    assert second.last_at == NOW + timedelta(seconds=5)
    assert third.application_name == "other"
    assert len(await sink.fetch_history(None, since, until, 10)) == 4
    assert len(await sink.fetch_history(None, since, until, 2)) == 2
