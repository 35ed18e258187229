"""Worker: one Engine in a process of its own, at the end of a line.

Gets its settings by the line and its listening socket by descriptor. When the
supervisor is gone, however that came, it drains and ends, before other machines
count its connections as gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

from ogelproxy.config import Config
from ogelproxy.engine import Engine
from ogelproxy.errors import LineFailed, OgelError
from ogelproxy.line import Line

log = logging.getLogger(__name__)

#: Seconds that the supervisor has to hand over the settings.
ENLIST_TIMEOUT = 30.0
#: Seconds that transactions get without a supervisor: its slots lapse in 6.8 s, the
#: time they are lent for on Redis less the interval of their renewal (`slots`).
ORPHAN_GRACE = 6.0


class Worker:
    """The inside of a worker process: `enlist`, then `run`."""

    def __init__(
        self, line: socket.socket, listening: socket.socket, place: int
    ) -> None:
        self._place = place
        self._line = Line("the supervisor")
        self._line_socket = line
        self._listening = listening
        self._drain_asked = asyncio.Event()
        self._engine: Engine | None = None  # once it is started
        self._newer: str | None = None  # settings that came before it was
        self._line.on("drain", lambda body: self._drain_asked.set())
        self._line.on("reload", self._reload)

    async def enlist(self) -> Config:
        """Ask for the settings. Raises LineFailed, TimeoutError."""
        await self._line.open(self._line_socket)
        return Config.restore(
            await self._line.ask("enlist", answer_timeout=ENLIST_TIMEOUT)
        )

    async def run(self, config: Config) -> bool:
        """Serve until asked to drain, cancelled, or alone; then drain and end.

        Returns False when the engine did not start; the supervisor knows why.
        """
        engine = Engine(
            config, listening=self._listening, line=self._line, place=self._place
        )
        self._line.on("metrics", lambda body: engine.metrics.totals().pack())
        self._line.on("status", lambda body: engine.status())
        try:
            await engine.start()
        except (OgelError, OSError) as error:
            self._tell("failed", str(error))
            await self._hang_up()
            return False
        self._engine = engine
        if self._newer is not None:
            self._reload(self._newer)
        self._tell("ready")
        try:
            await _first(
                self._drain_asked.wait(),
                engine.stop_asked.wait(),
                self._line.wait_closed(),
            )
        finally:
            self._tell("leaving")
            await self._drain(engine)
            self._tell("farewell", engine.metrics.totals().pack())
            await engine.stop()
            await self._hang_up()
        return True

    async def _drain(self, engine: Engine) -> None:
        """Drain; less long if the supervisor, who waits for it, ends at once."""
        if self._line.is_open:
            await _first(engine.drain(), self._line.wait_closed())
        else:
            log.warning("the supervisor is gone: draining")
            await engine.drain(min(engine.config.drain_timeout, ORPHAN_GRACE))

    def _reload(self, dumped: str) -> str:
        """Take new settings; return why not, or an empty text."""
        if self._engine is None:
            self._newer = dumped
            return ""
        try:
            self._engine.reload(Config.restore(dumped))
        except OgelError as error:
            # The supervisor read the same files a moment ago.
            log.error("not reloaded: %s", error)
            return str(error)
        return ""

    def _tell(self, name: str, body: Any = None) -> None:
        # Who is gone need not be told.
        with contextlib.suppress(LineFailed):
            self._line.tell(name, body)

    async def _hang_up(self) -> None:
        self._line.close()
        await self._line.wait_closed()


async def _first(*works: Any) -> None:
    """Wait until one is done, and end the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
