"""The Meter: what is counted reaches every sink once, through failures of all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest

from ogelproxy import usage
from ogelproxy.config import Secret, Usage
from ogelproxy.errors import ServerBusy, SpoolUnusable
from ogelproxy.tenants.model import DatabaseType, PoolMode, Target, Tenant, Tier
from ogelproxy.usage import Batch, MemorySink, Meter, Sink

TIER = Tier("pro", 50, 200, 100, True, 50, 200, 500, 0.12, 0.04, None)
TARGET = Target(
    id=UUID(int=1),
    name="app",
    type=DatabaseType.POSTGRES,
    pool_mode=PoolMode.AUTO,
    dsn=Secret("postgresql://"),
)


def tenant(number: int = 1) -> Tenant:
    return Tenant(
        id=UUID(int=number),
        handle=f"org_{number}",
        name="",
        tier=TIER,
        is_suspended=False,
        version=1,
        salt=b"",
    )


class FlakySink(MemorySink):
    """Fails while `is_down`, and after having stored while `loses_replies`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False
        self.loses_replies = False
        self.tries = 0
        self.changed = asyncio.Event()

    async def deliver(self, batch: Batch) -> None:
        self.tries += 1
        self.changed.set()
        if self.is_down:
            raise ConnectionError("down")
        await super().deliver(batch)
        if self.loses_replies:
            raise ConnectionError("lost")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a try after which `condition` holds."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()


def queries(sink: MemorySink) -> int:
    return sum(row.queries for row in sink.rows)


def settings(directory: Path, **changes: float) -> Usage:
    # The loops rest unless a test wants them: `flush` does their work.
    fields = {"batch_interval": 3600, "sync_interval": 60, "max_rows": 256}
    return Usage.model_validate({"spool_dir": directory, **fields, **changes})


@asynccontextmanager
async def running(
    directory: Path, *sinks: Sink, **changes: float
) -> AsyncIterator[Meter]:
    meter = Meter(settings(directory, **changes), sinks)
    await meter.start()
    try:
        yield meter
    finally:
        await meter.stop()


async def test_what_is_counted_arrives_with_its_payer(tmp_path: Path) -> None:
    sink = MemorySink()
    async with running(tmp_path, sink) as meter:
        who = meter.attribution(tenant(7), TARGET, "psql")
        meter.table.record(
            who, fingerprint=5, rows=2000, complexity=150, server_seconds=2.0
        )
        await meter.flush()
        (row,) = sink.rows
        assert row.payer == usage.Payer(
            UUID(int=7), "org_7", "pro", "postgres", "app", "psql"
        )
        assert (row.fingerprint, row.queries, row.vcpu_seconds) == (5, 1, 6.0)
        assert row.memory_gib_seconds == pytest.approx(2 * 4 / 1024)
        assert abs(row.first_at - time.time()) < 60


async def test_batches_close_by_themselves_and_the_table_stays_the_same(
    tmp_path: Path,
) -> None:
    sink = FlakySink()
    async with running(
        tmp_path, sink, batch_interval=0.02, sync_interval=0.01
    ) as meter:
        table = meter.table
        who = meter.attribution(tenant(), TARGET, "psql")
        for count in range(1, 4):
            table.record(who)
            await sink.until(lambda count=count: queries(sink) == count)
        assert len(sink.batches) == 3
        assert meter.table is table


async def test_a_batch_closes_when_the_hour_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FlakySink()
    async with running(tmp_path, sink, sync_interval=0.01) as meter:
        who = meter.attribution(tenant(), TARGET, "psql")
        meter.table.record(who)
        later = time.time() + 3600
        monkeypatch.setattr(usage.time, "time", lambda: later)
        await sink.until(lambda: queries(sink) == 1)


async def test_a_full_table_closes_its_batch_early(tmp_path: Path) -> None:
    sink = FlakySink()
    async with running(tmp_path, sink, sync_interval=0.01) as meter:
        who = meter.attribution(tenant(), TARGET, "psql")
        for fingerprint in range(1, 1001):
            meter.table.record(who, fingerprint=fingerprint)
        await sink.until(lambda: queries(sink) == 1000)
        assert not meter.table.is_full


async def test_a_sink_that_was_down_gets_all_of_it_in_order(tmp_path: Path) -> None:
    sink = FlakySink()
    async with running(tmp_path, sink) as meter:
        who = meter.attribution(tenant(), TARGET, "psql")
        sink.is_down = True
        for _ in range(3):
            meter.table.record(who)
            with pytest.raises(ExceptionGroup, match="not delivered"):
                await meter.flush()
        assert sink.batches == []
        sink.is_down = False
        await sink.until(lambda: queries(sink) == 3)
        assert [batch.number for batch in sink.batches] == [1, 2, 3]
        await meter.flush()
        assert (meter.delivered_count, meter.spooled_count) == (3, 0)


async def test_a_batch_whose_reply_was_lost_is_not_doubled(tmp_path: Path) -> None:
    sink = FlakySink()
    async with running(tmp_path, sink) as meter:
        meter.table.record(meter.attribution(tenant(), TARGET, "psql"))
        sink.loses_replies = True
        with pytest.raises(ExceptionGroup):
            await meter.flush()
        sink.loses_replies = False
        await meter.flush()
        assert sink.tries >= 2
        assert queries(sink) == 1


async def test_one_sink_that_is_down_holds_up_no_other(tmp_path: Path) -> None:
    up, down = MemorySink(), FlakySink()
    async with running(tmp_path, up, down) as meter:
        who = meter.attribution(tenant(), TARGET, "psql")
        down.is_down = True
        for _ in range(3):
            meter.table.record(who)
            with pytest.raises(ExceptionGroup):
                await meter.flush()
        assert queries(up) == 3
        down.is_down = False
        await meter.flush()
        assert queries(up) == queries(down) == 3
    assert os.listdir(tmp_path) == ["node"]


async def test_what_a_stop_could_not_deliver_the_next_start_does(
    tmp_path: Path,
) -> None:
    sink = FlakySink()
    sink.is_down = True
    async with running(tmp_path, sink) as meter:
        meter.table.record(meter.attribution(tenant(), TARGET, "psql"))
    assert queries(sink) == 0
    sink.is_down = False
    async with running(tmp_path, sink):
        await sink.until(lambda: queries(sink) == 1)


async def test_a_sink_that_hangs_ends_the_stop_at_its_grace(tmp_path: Path) -> None:
    class Hanging:
        async def deliver(self, batch: Batch) -> None:
            await asyncio.Event().wait()

    meter = Meter(settings(tmp_path), [Hanging()])
    await meter.start()
    meter.table.record(meter.attribution(tenant(), TARGET, "psql"))
    await meter.stop(grace=0.01)
    sink = MemorySink()
    async with running(tmp_path, sink) as heir:
        await heir.flush()
        assert queries(sink) == 1


async def test_an_unreadable_batch_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    (tmp_path / "0000000001.batch").write_bytes(b"foreign" * 100)
    sink = MemorySink()
    async with running(tmp_path, sink, MemorySink()) as meter:
        meter.table.record(meter.attribution(tenant(), TARGET, "psql"))
        await meter.flush()
        assert queries(sink) == 1
    assert (tmp_path / "0000000001.unreadable").exists()


async def test_two_meters_never_share_a_spool(tmp_path: Path) -> None:
    async with running(tmp_path, MemorySink()):
        with pytest.raises(SpoolUnusable, match="another process"):
            await Meter(settings(tmp_path), [MemorySink()]).start()


async def test_a_spool_without_room_keeps_counting_in_the_batch_there_is(
    tmp_path: Path,
) -> None:
    sink = FlakySink()
    async with running(tmp_path, sink, max_spool_bytes=1 << 24) as meter:
        who = meter.attribution(tenant(), TARGET, "psql")
        ballast = tmp_path / "ballast"
        with ballast.open("wb") as file:
            file.truncate(1 << 24)
        meter.table.record(who)
        with pytest.raises(SpoolUnusable, match="max_spool_bytes"):
            await meter.flush()
        assert meter.is_blocked
        for fingerprint in range(1, 2001):
            meter.table.record(who, fingerprint=fingerprint)
        ballast.unlink()
        await meter.flush()
        assert not meter.is_blocked
        assert queries(sink) == 2001


async def test_alike_clients_share_an_attribution(tmp_path: Path) -> None:
    async with running(tmp_path, MemorySink()) as meter:
        first = meter.attribution(tenant(), TARGET, "psql")
        assert meter.attribution(tenant(), TARGET, "psql") is first
        assert meter.attribution(tenant(), TARGET, "pgbench") is not first
        assert meter.attribution(tenant(2), TARGET, "psql") is not first


async def test_application_names_of_one_tenant_are_bounded(tmp_path: Path) -> None:
    sink = MemorySink()
    async with running(tmp_path, sink) as meter:
        for number in range(1000):
            meter.table.record(meter.attribution(tenant(), TARGET, f"app {number}"))
        meter.table.record(meter.attribution(tenant(2), TARGET, "psql"))
        await meter.flush()
        names = {row.payer.application_name for row in sink.rows}
        assert len(names) == usage.MAX_APPLICATION_NAMES + 2
        assert usage.OTHER_APPLICATIONS in names
        assert queries(sink) == 1001


async def test_too_many_tenants_are_refused_until_some_leave(tmp_path: Path) -> None:
    sink = MemorySink()
    async with running(tmp_path, sink) as meter:
        kept = []
        with pytest.raises(ServerBusy):
            for number in range(10_000):
                kept.append(meter.attribution(tenant(number), TARGET, "psql"))
        assert len(kept) >= 256
        for who in kept:
            meter.table.record(who)
        await meter.flush()
        assert queries(sink) == len(kept)
        del who
        kept.clear()
        meter.attribution(tenant(20_000), TARGET, "psql")


async def test_logins_without_queries_do_not_use_the_table_up(tmp_path: Path) -> None:
    async with running(tmp_path, MemorySink(), sync_interval=0.01) as meter:
        for number in range(3000):
            while True:
                try:
                    meter.attribution(tenant(number), TARGET, "psql")
                    break
                except ServerBusy:
                    await asyncio.sleep(0)


KILLED = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.test_usage import TARGET, settings, tenant
from ogelproxy.usage import MemorySink, Meter

class Down:
    async def deliver(self, batch):
        raise ConnectionError

async def main():
    config = settings(Path(sys.argv[1]), batch_interval=0.005, sync_interval=0.002)
    meter = Meter(config, [Down()])
    await meter.start()
    who = [meter.attribution(tenant(n), TARGET, "psql") for n in range(1, 4)]
    done = 0
    while True:
        for _ in range(50):
            meter.table.record(who[done % 3], fingerprint=1 + done % 11)
            done += 1
        os.write(1, b"%010d" % done)
        await asyncio.sleep(0)

asyncio.run(main())
"""


def kill_after(directory: Path, reports: int) -> int:
    """Kill a process that counts, when it said so `reports` times; its last word."""
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(directory), root],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    reported = child.stdout.read(10 * reports)
    while reports >= 10_000 and len(list(directory.rglob("*.batch"))) < 2:
        # A disk that is slow keeps the first batch open for longer.
        reported = child.stdout.read(10)
    child.kill()
    reported += child.stdout.read()
    child.stdout.close()
    child.wait()
    return int(reported[-10:])


@pytest.mark.parametrize("reports", [1, 200, 3000, 10_000])
async def test_nothing_is_lost_or_doubled_by_a_kill_between_batches(
    tmp_path: Path, reports: int
) -> None:
    count = kill_after(tmp_path, reports)
    sink = MemorySink(max_batches=100_000)
    async with running(tmp_path, sink) as meter:
        await meter.flush()
    assert count <= queries(sink) <= count + 50
    assert len(sink.batches) > 1 or reports < 10_000
