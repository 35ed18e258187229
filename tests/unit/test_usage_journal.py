"""Events on their way: on the disk first, delivered once, bounded."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest
from asyncpg.pgproto.pgproto import UUID as DriversUUID

from ogelproxy.errors import SpoolUnusable
from ogelproxy.usage.events import Event, EventKind, load
from ogelproxy.usage.journal import MAX_NOTED, MAX_TEXT, Journal

ORG = UUID(int=7)
#: In the middle of an hour.
NOON = 1_772_368_200.0


class Shelf:
    """A sink in memory, as exact as the real ones: the first of a key stays."""

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}
        self.failure: Exception | None = None
        self.calls = 0
        self.called = asyncio.Event()

    async def record(self, events: Sequence[Event]) -> None:
        self.calls += 1
        self.called.set()
        if self.failure is not None:
            raise self.failure
        for event in events:
            self.events.setdefault(event.key, event)

    @property
    def actions(self) -> list[str]:
        return [event.action for event in self.events.values()]


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def journal(directory: Path, shelf: Shelf, **options: object) -> Journal:
    settings: dict[str, object] = {"interval": 3600.0, "wall_clock": Clock()}
    return Journal(directory, shelf, **{**settings, **options})  # type: ignore[arg-type]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.events"))


async def test_what_was_recorded_is_on_the_disk_and_then_in_the_sink(
    tmp_path: Path,
) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    await kept.record("ann", "console.kill", ORG, command="KILL org_a/app")
    (path,) = files(tmp_path)
    event = load(path.read_bytes())
    assert (event.kind, event.actor, event.org_id) == (EventKind.AUDIT, "ann", ORG)
    assert event.details == {"command": "KILL org_a/app"}
    assert path.stat().st_mode & 0o777 == 0o600
    await kept.deliver()
    assert list(shelf.events.values()) == [event]
    assert files(tmp_path) == []
    await kept.stop()


async def test_what_a_tenant_met_is_noted_once_an_hour_by_all_processes(
    tmp_path: Path,
) -> None:
    shelf, clock = Shelf(), Clock()
    both = [journal(tmp_path, shelf, wall_clock=clock) for _ in range(2)]
    for each in both:
        await each.start()
        for _ in range(100):
            each.note(ORG, "upgrade_prompt.max_connections", limit=5)
        each.note(UUID(int=8), "upgrade_prompt.max_connections", limit=5)
    clock.now += 3600
    both[0].note(ORG, "upgrade_prompt.max_connections", limit=5)
    for each in both:
        await each.stop()
    assert len(shelf.events) == 3


async def test_what_a_tenant_meets_is_bounded(tmp_path: Path) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    for number in range(MAX_NOTED + 50):
        kept.note(UUID(int=number), "upgrade_prompt.max_connections")
        if number % 500 == 0:
            await asyncio.sleep(0)
            await kept.record("ann", "console.reload", None)  # behind them
    noted = sum(1 for event in shelf.events.values() if event.org_id is not None)
    assert noted <= MAX_NOTED
    assert kept.dropped_count >= 50
    await kept.stop()


async def test_a_sink_that_fails_gets_the_events_again(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.failure = OSError("away")
    kept = journal(tmp_path, shelf)
    await kept.start()
    await kept.record("ann", "console.pause", None)
    with pytest.raises(OSError, match="away"):
        await kept.deliver()
    await kept.record("ann", "console.resume", None)
    shelf.failure = None
    await kept.deliver()
    assert shelf.actions == ["console.pause", "console.resume"]
    await kept.stop()


async def test_what_the_sink_did_not_take_is_delivered_by_the_next_start(
    tmp_path: Path,
) -> None:
    shelf = Shelf()
    shelf.failure = OSError("away")
    first = journal(tmp_path, shelf)
    await first.start()
    await first.record("ann", "console.pause", None)
    await first.stop()
    assert shelf.actions == []
    shelf.failure = None
    shelf.called.clear()
    second = journal(tmp_path, shelf)
    await second.start()
    await shelf.called.wait()
    await second.stop()
    assert shelf.actions == ["console.pause"]
    assert files(tmp_path) == []


KILLED = """
import asyncio, os, sys
from pathlib import Path
from ogelproxy.usage.events import LoggedEvents
from ogelproxy.usage.journal import Journal
async def run():
    journal = Journal(Path(sys.argv[1]), LoggedEvents(), interval=3600.0)
    await journal.start()
    await journal.record("ann", "console.shutdown", None)
    os.kill(os.getpid(), 9)
asyncio.run(run())
"""


async def test_a_killed_process_leaves_its_events_to_the_others(tmp_path: Path) -> None:
    shelf = Shelf()
    living = journal(tmp_path, shelf)
    await living.start()
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", KILLED, str(tmp_path)], check=False
    )
    assert ended.returncode == -9
    with files(tmp_path)[0].open("ab") as file:
        file.write(b'{"key": "torn')
    await living.deliver()
    assert shelf.actions == ["console.shutdown"]
    await living.stop()


async def test_a_file_that_somebody_writes_is_left_alone(tmp_path: Path) -> None:
    shelf = Shelf()
    one, other = journal(tmp_path, shelf), journal(tmp_path, shelf)
    await one.start()
    await other.start()
    await one.record("ann", "console.pause", None)
    await other.deliver()
    assert shelf.calls == 0
    await one.stop()
    await other.stop()
    assert shelf.actions == ["console.pause"]


async def test_a_delivered_file_that_could_not_be_removed_changes_nothing(
    tmp_path: Path,
) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    await kept.record("ann", "console.pause", None)
    data = files(tmp_path)[0].read_bytes()
    await kept.deliver()
    (tmp_path / "1.events").write_bytes(data)  # as a kill before the removal
    await kept.deliver()
    assert (shelf.calls, len(shelf.events)) == (2, 1)
    await kept.stop()


async def test_a_line_that_is_no_event_keeps_nobody_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    good = Event("k", EventKind.AUDIT, NOON, "ann", "console.pause", None, {}).dump()
    (tmp_path / "1.events").write_bytes(b"{}\n[]\nnull\n\xff\n" + good)
    await kept.deliver()
    assert shelf.actions == ["console.pause"]
    assert caplog.text.count("no event") == 4
    await kept.stop()


async def test_the_audit_has_room_that_analytics_have_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    shelf.failure = OSError("away")
    kept = journal(tmp_path, shelf, max_bytes=4000)
    await kept.start()
    for number in range(100):
        kept.note(UUID(int=number), "upgrade_prompt.max_connections")
        await kept.record("ann", "console.pause", None)
        if kept.is_crowded:
            break
    assert kept.is_crowded
    assert "half full" in caplog.text
    lines = b"".join(path.read_bytes() for path in files(tmp_path)).splitlines()
    dropped = kept.dropped_count
    assert dropped > 0
    await kept.record("ann", "console.resume", None)
    after = b"".join(path.read_bytes() for path in files(tmp_path)).splitlines()
    assert len(after) == len(lines) + 1
    # Beyond the bound the log is what is left.
    with caplog.at_level(logging.ERROR):
        for _ in range(40):
            await kept.record("ann", "console.shutdown", None)
    assert 'audit: {"key"' in caplog.text
    used = sum(path.stat().st_size for path in files(tmp_path))
    assert used <= 4000
    await kept.stop()


async def test_texts_are_cut_and_cleaned_for_every_sink(tmp_path: Path) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    await kept.record("a\0nn", "console.kill", None, command="x" * 5000 + "\0")
    await kept.stop()
    (event,) = shelf.events.values()
    assert event.actor == "ann"
    assert event.details == {"command": "x" * MAX_TEXT}


async def test_a_disk_that_fails_stops_no_operator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "events"
    kept = journal(directory, Shelf())
    await kept.start()
    directory.rmdir()
    await kept.record("ann", "console.pause", None)
    assert "console.pause" in caplog.text
    directory.mkdir()
    await kept.record("ann", "console.resume", None)
    assert len(files(directory)) == 1
    await kept.stop()


async def test_an_organisation_may_be_known_by_the_drivers_uuid(tmp_path: Path) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    await kept.record("ann", "console.pause", DriversUUID(ORG.bytes))
    await kept.stop()
    (event,) = shelf.events.values()
    assert event.org_id == ORG


async def test_a_directory_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolUnusable, match="file"):
        await journal(tmp_path / "file" / "events", Shelf()).start()


async def test_an_empty_file_that_is_removed_under_its_writer_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf)
    await kept.start()
    lock = fcntl.flock
    taken: list[Path] = []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            # Another process comes between the making of the file and its lock.
            taken.extend(files(tmp_path))
            os.unlink(taken[0])
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    await kept.record("ann", "console.pause", None)
    await kept.stop()
    assert taken
    assert shelf.actions == ["console.pause"]


async def test_events_are_delivered_after_the_interval(tmp_path: Path) -> None:
    shelf = Shelf()
    kept = journal(tmp_path, shelf, interval=0.01, wall_clock=time.time)
    await kept.start()
    kept.note(ORG, "upgrade_prompt.max_connections")
    await asyncio.wait_for(shelf.called.wait(), 10)
    await kept.stop()
    assert len(shelf.events) == 1
