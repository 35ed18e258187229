"""Place: a listening socket, and the workers that accept on it one after the other.

The socket outlives them: while nobody accepts, connections wait in its queue. A
worker that ends unasked is replaced, after a pause that doubles while workers end
soon; one that is replaced on purpose goes on until the new one accepts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ogelproxy.config import PREFIX, WELL_KNOWN
from ogelproxy.errors import LineFailed, WorkerFailed
from ogelproxy.line import Line

log = logging.getLogger(__name__)

#: Seconds until a worker is replaced: the first time, and at most.
FIRST_PAUSE = 0.1
LAST_PAUSE = 10.0
#: Seconds that a worker has to run for its end to be a first one again.
STEADY_INTERVAL = 10.0
#: Seconds from the start of a process to ready.
START_TIMEOUT = 60.0


class Process:
    """One worker, as its supervisor knows it."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.line = Line(f"worker {place}")
        self.state: Literal["starting", "ready", "draining", "ended"] = "starting"
        self.pid = 0  # 0 before it was started
        self.started_at = time.time()  # Unix time, for people
        self.totals: Mapping[str, Any] | None = None  # its metrics as last told
        self.ended = asyncio.Event()
        self._ready = asyncio.Event()
        self._reason = ""  # why it can't start, in its own words
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None  # until it has ended
        self.line.on("ready", self._set_ready)
        self.line.on("failed", self._fail)

    async def start(
        self,
        listening: socket.socket,
        *,
        lost: Callable[[Process], None],
        gone: Callable[[Process], None],
    ) -> None:
        """Run it, accepting on `listening`. Raises OSError.

        `lost` is called when its line is: it has ended, or will by itself. `gone` is
        called when it has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            await self.line.open(ours)
            handed = (listening.fileno(), theirs.fileno())
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "ogelproxy", "worker"),
                    *map(str, (self.place, *handed)),
                    pass_fds=handed,
                    stdin=asyncio.subprocess.DEVNULL,
                    env=_without_settings(os.environ),
                    # A terminal's Ctrl-C is the supervisor's to pass on.
                    start_new_session=True,
                )
            except BaseException:
                self.line.close()
                raise
        self.pid = self._process.pid
        self._watch = asyncio.create_task(self._wait(self._process, lost, gone))

    async def wait_ready(self) -> None:
        """Wait until it accepts. Raises WorkerFailed."""
        waits = [asyncio.create_task(each.wait()) for each in (self._ready, self.ended)]
        try:
            await asyncio.wait(
                waits, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for wait in waits:
                wait.cancel()
        if self._reason or not self._ready.is_set():
            raise WorkerFailed(self._reason or f"worker {self.place} did not start")

    def drain(self) -> None:
        """Ask it to accept no more, let transactions finish, and end."""
        self.state = "draining"
        # Without a line it does so anyway.
        with contextlib.suppress(LineFailed):
            self.line.tell("drain")

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _set_ready(self, body: None) -> None:
        self.state = "ready"
        self._ready.set()

    def _fail(self, reason: str) -> None:
        self._reason = reason

    async def _wait(
        self,
        process: asyncio.subprocess.Process,
        lost: Callable[[Process], None],
        gone: Callable[[Process], None],
    ) -> None:
        await self.line.wait_closed()
        lost(self)
        await process.wait()
        self.state = "ended"
        self.ended.set()
        gone(self)


class Place:
    """One of the places that a machine has for workers."""

    def __init__(
        self,
        number: int,
        listening: socket.socket,
        *,
        introduce: Callable[[Process], None],
        gone: Callable[[Process], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`introduce` is called with each process at its start, `gone` at its end."""
        self.number = number
        self.restart_count = 0  # workers that ended unasked
        self.current: Process | None = None  # who accepts here
        self._listening = listening
        self._introduce = introduce
        self._gone = gone
        self._clock = clock
        self._hiring = asyncio.Lock()  # one new worker at a time
        self._vacant = asyncio.Event()  # `current` ended unasked
        self._failures = 0  # ends in a row that came too soon
        self._hired_at = 0.0  # by `clock`: when `current` became ready

    async def fill(self) -> None:
        """Start a worker, if none is here. Raises WorkerFailed, OSError."""
        async with self._hiring:
            if self.current is None:
                self._put(await self._hire())

    async def keep(self) -> None:
        """Replace workers that end unasked, for ever."""
        while True:
            await self._vacant.wait()
            self._vacant.clear()
            pause = min(FIRST_PAUSE * 2.0 ** min(self._failures, 16), LAST_PAUSE)
            self._failures += 1
            self.restart_count += 1
            log.warning("worker %d is replaced in %.1f s", self.number, pause)
            await asyncio.sleep(pause)
            try:
                await self.fill()
            except (WorkerFailed, OSError) as error:
                log.error("worker %d was not replaced: %s", self.number, error)
                self._vacant.set()

    async def replace(self, patience: float) -> None:
        """Put a new worker in the place of the one that is here, which drains.

        Returns when that one has ended, killed if that takes more than `patience`
        seconds. Raises WorkerFailed or OSError when the new one doesn't start; the
        old one stays then.
        """
        async with self._hiring:
            old = self.current
            if old is None:
                return  # one is about to be started anyway
            self._put(await self._hire())
        old.drain()
        try:
            async with asyncio.timeout(patience):
                await old.ended.wait()
        except TimeoutError:
            log.error("worker %d (process %d) is killed", self.number, old.pid)
            old.kill()
            await old.ended.wait()

    def leave(self, process: Process) -> None:
        """Count a worker as gone that accepts no more, though it still drains."""
        process.state = "draining"
        if process is self.current:
            log.warning("worker %d (process %d) leaves", self.number, process.pid)
            self._vacate()

    async def _hire(self) -> Process:
        process = Process(self.number)
        self._introduce(process)
        try:
            await process.start(self._listening, lost=self._lost, gone=self._gone)
        except BaseException:
            self._gone(process)
            raise
        try:
            await process.wait_ready()
        except BaseException:
            process.kill()
            raise
        return process

    def _put(self, process: Process) -> None:
        self.current = process
        self._hired_at = self._clock()
        if not process.line.is_open:
            self._lost(process)

    def _lost(self, process: Process) -> None:
        if process is self.current:
            if process.state == "ready":
                log.error("worker %d (process %d) is lost", self.number, process.pid)
            self._vacate()

    def _vacate(self) -> None:
        self.current = None
        if self._clock() - self._hired_at >= STEADY_INTERVAL:
            self._failures = 0
        self._vacant.set()


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for workers: settings, secret ones too, come by line."""
    return {
        name: value
        for name, value in environ.items()
        if name not in WELL_KNOWN and not name.startswith(PREFIX)
    }
