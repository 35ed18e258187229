"""Admin: the operators' small HTTP server. Health, readiness, metrics, status.

It sees who can tell, an engine or a supervisor, never the parts behind it. Nothing
here asks who is there: the address it listens on is whom it trusts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import orjson
from aiohttp import web

from ogelproxy import config
from ogelproxy.metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

#: No request here has a body, and none needs long headers.
MAX_BODY_BYTES = 4096
MAX_LINE_BYTES = 2048
MAX_HEADERS = 64
#: Seconds that requests get to finish in when the server stops.
SHUTDOWN_TIMEOUT = 1.0


class Told(Protocol):
    """Who tells what is shown."""

    @property
    def is_ready(self) -> bool: ...

    async def render(self) -> bytes:
        """Return all metrics, in Prometheus' text format."""

    async def describe(self) -> Mapping[str, Any]:
        """Return a picture for operators.

        The list `reasons` in it, if there is one, is also what `/ready` gives while
        `is_ready` is false.
        """


class Admin:
    """Answer `/health`, `/ready`, `/metrics` and `/status`."""

    def __init__(self, config: config.Admin, told: Told) -> None:
        self._config = config
        self._told = told
        self._runner: web.AppRunner | None = None  # there from start to stop

    @property
    def port(self) -> int:
        """The port that it listens on; 0 while it doesn't."""
        return 0 if self._runner is None else int(self._runner.addresses[0][1])

    async def start(self) -> None:
        """Listen, if a port is set. Raises OSError naming the setting that failed."""
        if self._config.port is None:
            return
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/status", self._show_status)
        runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._config.host, self._config.port).start()
        except OSError as error:
            await runner.cleanup()
            where = f"admin.host {self._config.host}, admin.port {self._config.port}"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno, f"{where}: {reason}") from error
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        log.info("admin listens on %s port %d", self._config.host, self.port)

    async def stop(self) -> None:
        """Stop listening; requests under way get a second."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        # That the loop ran this is the answer.
        return _json({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._told.is_ready:
            return _json({"ready": True, "reasons": []})
        reasons = list((await self._told.describe()).get("reasons", ()))
        return _json({"ready": False, "reasons": reasons}, status=503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=await self._told.render(), headers={"Content-Type": CONTENT_TYPE}
        )

    async def _show_status(self, request: web.Request) -> web.Response:
        return _json(await self._told.describe())


def _json(content: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(
        # A mapping of any kind, of which orjson knows only dict.
        body=orjson.dumps(dict(content)),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
