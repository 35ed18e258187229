"""Journal: events from where they happen to the sink, through files of its own.

An event is on the disk before it counts as recorded, and its file goes when the
sink has it. The directory is shared by all processes of a machine: who writes a
file holds its lock, and any process delivers what nobody writes any more. Knows
nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import UUID, uuid4

from ogelproxy.errors import SpoolUnusable
from ogelproxy.usage.events import Event, EventKind, EventSink, load
from ogelproxy.usage.sinks import HOUR, retry_interval

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: Who is said to have noticed what tenants met.
ACTOR = "ogelproxy"

#: Bytes of all files: some 200,000 events. Analytics may take half of it, so that
#: there is room for the audit.
MAX_BYTES = 64 * 1024 * 1024
#: Bytes of one file, which is read and delivered at once.
MAX_FILE_BYTES = 256 * 1024
#: Characters of one text in the details.
MAX_TEXT = 500

#: Events that wait for the disk, and kinds of events told apart in one hour.
MAX_QUEUED = 1_000
MAX_NOTED = 20_000

#: Seconds that an operator's act waits for its event to be on the disk.
WRITE_TIMEOUT = 5.0
DELIVERY_TIMEOUT = 30.0

SUFFIX = ".events"

#: An event for the disk, and who waits for it, if anybody does.
Queued = tuple[Event, asyncio.Future[None] | None]


@dataclass(frozen=True, slots=True)
class Claim:
    """A file that nobody else reads or writes."""

    path: Path
    descriptor: int  # holds the lock
    events: list[Event]


class EventFiles:
    """The files, one of which is ours to write. All methods block on the disk."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._descriptor = -1  # of the file that is ours; -1 without one
        self._written_bytes = 0  # to that file

    def open(self) -> None:
        """Make the directory. Raises SpoolUnusable."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SpoolUnusable(f"{self._directory}: {error.strerror}") from error

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines and wait until they are on the disk.

        Raises OSError, and SpoolUnusable when there are too many bytes.
        """
        data = b"".join(lines)
        if self.used_bytes() + len(data) > self._max_bytes:
            raise SpoolUnusable(f"{self._directory} has {self._max_bytes} bytes")
        if self._descriptor < 0:
            self._descriptor = self._create()
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
            os.fdatasync(self._descriptor)
        except OSError:
            # What is behind the last whole line is not read.
            self.close()
            raise
        self._written_bytes += written
        if self._written_bytes >= MAX_FILE_BYTES:
            self.close()

    def _create(self) -> int:
        while True:
            # The time first: names sort by age.
            path = self._directory / f"{time.time_ns():020d}-{uuid4().hex[:8]}{SUFFIX}"
            descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._sync_directory()
                is_ours = os.fstat(descriptor).st_nlink > 0
            except BaseException:
                os.close(descriptor)
                raise
            if is_ours:
                self._written_bytes = 0
                return descriptor
            # Somebody took it for an empty one that was left, and removed it.
            os.close(descriptor)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """End our file: it may be delivered."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def ended(self) -> list[Path]:
        """Return the files, oldest first; some may be written by others still."""
        return sorted(self._directory.glob(f"*{SUFFIX}"))

    def claim(self, path: Path) -> Claim | None:
        """Take a file for ourselves; None when somebody else has it, or had it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return Claim(path, descriptor, _read(path))
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def release(self, claim: Claim, *, is_delivered: bool) -> None:
        """Remove a file that was delivered, or leave it to whoever comes."""
        if is_delivered:
            claim.path.unlink(missing_ok=True)
        os.close(claim.descriptor)

    def used_bytes(self) -> int:
        """Return the bytes of all files."""
        total = 0
        for path in self.ended():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total


def _read(path: Path) -> list[Event]:
    events = []
    # Behind the last newline is what a kill cut off: nobody relied on it.
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            events.append(load(line))
        except ValueError as error:
            logger.error("%s holds a line that is no event: %s", path, error)
    return events


class Journal:
    """Takes events and delivers them to `sink`; `forward` brings those of others.

    `interval` is the seconds for which events are gathered. Starts and stops once.
    """

    def __init__(
        self,
        directory: Path,
        sink: EventSink,
        *,
        interval: float,
        forward: Callable[[], Awaitable[None]] | None = None,
        max_bytes: int = MAX_BYTES,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.dropped_count = 0  # events that found no room
        self.is_crowded = False  # analytics events are dropped for want of room
        self._sink = sink
        self._interval = interval
        self._forward = forward
        self._max_analytics_bytes = max_bytes // 2
        self._wall_clock = wall_clock
        self._files = EventFiles(directory, max_bytes)
        self._queue: deque[Queued] = deque()
        self._queued = asyncio.Event()
        # What was noted since the hour, of Unix time, began.
        self._hour = 0
        self._noted: set[tuple[UUID, str]] = set()
        self._disk = ThreadPoolExecutor(1, "usage-events")
        self._failures = 0  # deliveries since the last that went well
        self._is_stopping = False  # what is queued is written, and nothing else
        self._ending = asyncio.Event()  # what is written is delivered once more
        self._writer: asyncio.Task[None] | None = None
        self._feeder: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the directory and begin to deliver. Raises SpoolUnusable."""
        await self._on_disk(self._files.open)
        self._writer = asyncio.create_task(self._write(), name="events-writer")
        self._feeder = asyncio.create_task(self._feed(), name="events-feeder")

    async def stop(self, grace: float = 5.0) -> None:
        """Write what waits, and deliver for at most `grace` seconds.

        What the sink didn't take stays in the directory for whoever comes.
        """
        if self._writer is None or self._feeder is None:
            return
        self._is_stopping = True
        self._queued.set()
        await self._writer
        self._writer = None
        self._ending.set()
        try:
            async with asyncio.timeout(grace):
                await self._feeder
        except TimeoutError:
            logger.warning("events stay in their spool: the sink is too slow")
        self._disk.shutdown()

    async def record(
        self, actor: str, action: str, org_id: UUID | None, **details: object
    ) -> None:
        """Record what somebody did, and wait until it is on the disk.

        Where it can't be written the log has it: the act goes on.
        """
        event = Event(
            key=str(uuid4()),
            kind=EventKind.AUDIT,
            at=self._wall_clock(),
            actor=_clean(actor),
            action=action,
            org_id=org_id,
            details={name: _clean(value) for name, value in details.items()},
        )
        written = asyncio.get_running_loop().create_future()
        self._queue.append((event, written))
        self._queued.set()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await written
        except Exception as error:
            logger.error("audit: %s (%s)", event.dump().decode().rstrip(), _text(error))

    def note(self, org_id: UUID, action: str, **details: object) -> None:
        """Note what an organisation met: once an hour, in however many processes.

        The key is made of organisation, action and hour, so that sinks keep one
        of them, and clients can't flood anybody.
        """
        now = self._wall_clock()
        if int(now // HOUR) != self._hour:
            self._hour = int(now // HOUR)
            self._noted.clear()
        if (org_id, action) in self._noted:
            return
        if len(self._noted) >= MAX_NOTED or len(self._queue) >= MAX_QUEUED:
            self.dropped_count += 1
            return
        self._noted.add((org_id, action))
        event = Event(
            key=f"{org_id}-{action}-{self._hour}",
            kind=EventKind.ANALYTICS,
            at=now,
            actor=ACTOR,
            action=action,
            org_id=org_id,
            details={name: _clean(value) for name, value in details.items()},
        )
        self._queue.append((event, None))
        self._queued.set()

    async def _write(self) -> None:
        """Write what is queued, until the end."""
        while self._queue or not self._is_stopping:
            await self._queued.wait()
            self._queued.clear()
            taken = list(self._queue)
            self._queue.clear()
            try:
                if lines := [event.dump() for event in await self._admitted(taken)]:
                    await self._on_disk(self._files.append, lines)
            except Exception as error:
                # Whatever it is: what comes next may be written again.
                self.dropped_count += len(taken)
                logger.error("events were not written: %s", _text(error))
                _settle(taken, error)
            else:
                _settle(taken, None)

    async def _admitted(self, taken: list[Queued]) -> list[Event]:
        """Return what there is room for: analytics leave half of it to the audit."""
        used_bytes = await self._on_disk(self._files.used_bytes)
        was_crowded = self.is_crowded
        self.is_crowded = used_bytes >= self._max_analytics_bytes
        events = [event for event, _ in taken]
        if not self.is_crowded:
            return events
        if not was_crowded:
            logger.error("the event spool is half full: is its sink reachable?")
        audit = [event for event in events if event.kind is EventKind.AUDIT]
        self.dropped_count += len(events) - len(audit)
        return audit

    async def _feed(self) -> None:
        """Deliver what was gathered until the end, slower while the sink fails."""
        while True:
            is_last = self._ending.is_set()
            interval = self._interval
            try:
                await self.deliver()
            except Exception as error:
                self._failures += 1
                interval = retry_interval(self._failures)
                logger.warning("events stay in their spool: %s", _text(error))
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._ending.wait()

    async def deliver(self) -> None:
        """Deliver all files that nobody writes, ours too, and what others left.

        Raises what the sink raises.
        """
        await self._on_disk(self._files.close)
        for path in await self._on_disk(self._files.ended):
            claim = await self._on_disk(self._files.claim, path)
            if claim is None:
                continue
            is_delivered = False
            try:
                if claim.events:
                    async with asyncio.timeout(DELIVERY_TIMEOUT):
                        await self._sink.record(claim.events)
                is_delivered = True
            finally:
                await self._on_disk(
                    self._files.release, claim, is_delivered=is_delivered
                )
        if self._forward is not None:
            async with asyncio.timeout(DELIVERY_TIMEOUT):
                await self._forward()
        self._failures = 0

    async def _on_disk(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run `function` in the one thread that uses the files."""
        call = functools.partial(function, *args, **kwargs)
        # Once begun it is done: a file that was taken is given back.
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(self._disk, call)
        )


def _settle(taken: list[Queued], error: Exception | None) -> None:
    """Tell who waits for the events how their writing went."""
    for _, written in taken:
        if written is None or written.done():
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)


def _clean(value: Any) -> Any:
    """Return a text as all sinks take it, jsonb too: short, without zeros."""
    if isinstance(value, str):
        return value.replace("\0", "")[:MAX_TEXT]
    return value


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
