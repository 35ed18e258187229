"""Usage in the control plane's Postgres: once, whole, and through its outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from ogelproxy.config import Secret, Usage
from ogelproxy.tenants.model import DatabaseType, PoolMode, Target, Tenant, Tier
from ogelproxy.usage import Batch, Meter, Payer, PostgresSink, Row
from tests.fixtures.postgres import Postgres

ORG = UUID(int=7)
#: A moment in the middle of an hour.
NOON = datetime(2026, 3, 1, 12, 30, tzinfo=UTC).timestamp()
PAYER = Payer(ORG, "org_7", "pro", "postgres", "app", "psql")
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
    bytes_out=1000,
    server_seconds=1.5,
    queue_seconds=0.25,
    throttled_seconds=0.125,
    vcpu_seconds=7200.0,
    memory_gib_seconds=1800.0,
    longest_seconds=1.0,
    first_at=NOON,
    last_at=NOON + 5,
)


def batch(node: UUID, number: int, *rows: Row) -> Batch:
    return Batch(node, number, NOON, rows)


@pytest.fixture
async def pool(postgres: Postgres) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """Connections to a fresh control plane."""
    dsn = postgres.dsn(await asyncio.to_thread(postgres.create_database))
    async with asyncpg.create_pool(dsn, min_size=1, max_size=8) as pool:
        migrations = files("ogelproxy.tenants") / "migrations"
        await pool.execute("CREATE SCHEMA platform")
        for name in ("0001_platform.sql", "0002_usage.sql"):
            await pool.execute((migrations / name).read_text())
        yield pool


async def history(pool: Any) -> list[Any]:
    return await pool.fetch("SELECT * FROM platform.usage_history ORDER BY batch, slot")


async def totals(pool: Any) -> list[Any]:
    return await pool.fetch(
        "SELECT org_id, database_type, vcpu_hours, memory_gb_hours, query_count, rows, "
        "bytes, period_start, period_end FROM platform.usage_metrics ORDER BY 1, 2, 8"
    )


async def test_a_batch_is_entered_row_by_row_and_rolled_up_by_the_hour(
    pool: Any,
) -> None:
    node = uuid4()
    neon = replace(PAYER, database_type="neon", application_name="é")
    await PostgresSink(pool, 3650).deliver(
        batch(
            node,
            1,
            ROW,
            replace(ROW, slot=5, fingerprint=0, sqlstate="", first_at=NOON - 3600),
            replace(ROW, slot=9, payer=neon),
            replace(ROW, slot=10),
        )
    )
    first, second, third, _ = await history(pool)
    assert first["fingerprint"] == -5
    assert (first["node"], first["batch"], first["slot"]) == (node, 1, 4)
    assert (first["org_id"], first["handle"], first["tier"]) == (ORG, "org_7", "pro")
    assert (first["queries"], first["refused"], first["errors"]) == (3, 1, 1)
    assert (first["sqlstate"], second["sqlstate"]) == ("42601", None)
    assert (first["bytes_in"], first["bytes_out"]) == (100, 1000)
    assert (first["queue_seconds"], first["throttled_seconds"]) == (0.25, 0.125)
    assert first["last_at"] - first["first_at"] == timedelta(seconds=5)
    assert (third["database_type"], third["application_name"]) == ("neon", "é")
    hour = datetime(2026, 3, 1, 12, tzinfo=UTC)
    one, step = (2.0, 0.5, 3, 20, 1100), timedelta(hours=1)
    assert [tuple(total) for total in await totals(pool)] == [
        (ORG, "neon", *one, hour, hour + step),
        (ORG, "postgres", *one, hour - step, hour),
        (ORG, "postgres", 4.0, 1.0, 6, 40, 2200, hour, hour + step),
    ]


async def test_a_batch_that_comes_again_changes_nothing(pool: Any) -> None:
    node, other = uuid4(), uuid4()
    sink = PostgresSink(pool, 3650)
    for number in (1, 2, 4, 1, 4, 3, 2):
        await sink.deliver(batch(node, number, ROW))
    await PostgresSink(pool, 3650).deliver(batch(node, 3, ROW))
    await sink.deliver(batch(other, 1, ROW))
    assert len(await history(pool)) == 5
    assert (await totals(pool))[0]["query_count"] == 15
    (known,) = await pool.fetch(
        "SELECT delivered::text FROM platform.usage_nodes WHERE node = $1", node
    )
    assert known["delivered"] == "{[1,5)}"


async def test_the_same_batch_sent_at_once_by_many_is_entered_once(pool: Any) -> None:
    node = uuid4()
    sinks = [PostgresSink(pool, 3650) for _ in range(8)]
    await asyncio.gather(*(sink.deliver(batch(node, 1, ROW)) for sink in sinks))
    assert len(await history(pool)) == 1


async def test_many_nodes_that_bill_the_same_tenants_do_not_deadlock(
    pool: Any,
) -> None:
    payers = [replace(PAYER, org_id=UUID(int=n)) for n in range(40)]
    rows = [replace(ROW, slot=n + 4, payer=payer) for n, payer in enumerate(payers)]
    sinks = [PostgresSink(pool, 3650) for _ in range(8)]

    async def send(sink: PostgresSink, node: UUID, rows: list[Row]) -> None:
        for number in range(1, 6):
            await sink.deliver(batch(node, number, *rows))

    await asyncio.gather(
        *(
            send(sink, uuid4(), rows[::-1] if at % 2 else rows)
            for at, sink in enumerate(sinks)
        )
    )
    assert [total["query_count"] for total in await totals(pool)] == [120] * 40


async def test_a_batch_that_fails_half_way_leaves_no_trace(pool: Any) -> None:
    node = uuid4()
    sink = PostgresSink(pool, 3650)
    bad = replace(ROW, payer=replace(PAYER, database_type="oracle"))
    with pytest.raises(asyncpg.CheckViolationError):
        await sink.deliver(batch(node, 1, ROW, replace(bad, slot=5)))
    assert await history(pool) == []
    await sink.deliver(batch(node, 1, ROW))
    assert len(await history(pool)) == 1


async def test_old_history_goes_and_the_totals_stay(pool: Any) -> None:
    now = datetime.now(UTC)
    old = (now - timedelta(days=3)).timestamp()
    clock = iter([0.0, 1.0, 61.0])
    sink = PostgresSink(pool, 2, clock=lambda: next(clock))
    node = uuid4()
    await sink.deliver(batch(node, 1, replace(ROW, first_at=now.timestamp())))
    await sink.deliver(batch(node, 2, replace(ROW, first_at=old)))
    assert len(await history(pool)) == 2
    await sink.deliver(batch(node, 3, replace(ROW, first_at=now.timestamp())))
    assert [row["batch"] for row in await history(pool)] == [1, 3]
    assert sum(total["query_count"] for total in await totals(pool)) == 9


async def test_history_that_can_not_be_pruned_holds_up_no_batch(pool: Any) -> None:
    await pool.execute(
        "CREATE RULE keep AS ON DELETE TO platform.usage_history "
        "DO INSTEAD SELECT 1 / 0"
    )
    await PostgresSink(pool, 1).deliver(batch(uuid4(), 1, ROW))
    assert len(await history(pool)) == 1


async def test_usage_survives_an_outage_of_postgres(
    pool: Any, postgres: Postgres, tmp_path: Path
) -> None:
    tier = Tier("pro", 50, 200, 100, True, 50, 200, 500, 0.12, 0.04, None)
    tenant = Tenant(
        id=ORG,
        handle="org_7",
        name="",
        tier=tier,
        is_suspended=False,
        version=1,
        salt=b"",
    )
    target = Target(
        id=uuid4(),
        name="app",
        type=DatabaseType.POSTGRES,
        pool_mode=PoolMode.AUTO,
        dsn=Secret("postgresql://"),
    )
    config = Usage(spool_dir=tmp_path, batch_interval=3600, sync_interval=60)
    meter = Meter(config, [PostgresSink(pool, 30)])
    await meter.start()
    who = meter.attribution(tenant, target, "psql")
    meter.table.record(who, fingerprint=1)
    await meter.flush()
    await postgres.stop()
    try:
        meter.table.record(who, fingerprint=1)
        with pytest.raises(ExceptionGroup, match="not delivered"):
            await meter.flush()
        assert meter.spooled_count == 1
    finally:
        await postgres.start()
    meter.table.record(who, fingerprint=2)
    await meter.flush()
    await meter.stop()
    assert [row["batch"] for row in await history(pool)] == [1, 2, 3]
    assert sum(total["query_count"] for total in await totals(pool)) == 3
