"""Admin: its four pages over real HTTP, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from ogelproxy import config
from ogelproxy.admin import Admin
from ogelproxy.metrics import GaugeSample, Metrics


class Stage:
    """What an engine would say, to be changed by a test."""

    def __init__(self) -> None:
        self.is_ready = True
        self.status: dict[str, Any] = {"clients": 2}
        self.metrics = Metrics()
        self.admin = Admin(config.Admin(port=0), self)

    async def render(self) -> bytes:
        return self.metrics.render()

    async def describe(self) -> Mapping[str, Any]:
        return self.status

    async def get(
        self, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        url = f"http://127.0.0.1:{self.admin.port}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, headers=headers) as answer,
        ):
            kind = answer.headers.get("Content-Type", "")
            return answer.status, kind, await answer.read()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    await stage.admin.start()
    try:
        yield stage
    finally:
        await stage.admin.stop()


async def test_health_says_that_the_loop_lives(stage: Stage) -> None:
    stage.is_ready = False
    status, kind, body = await stage.get("/health")
    assert (status, body) == (200, b'{"status":"ok"}')
    assert kind.startswith("application/json")


async def test_ready_follows_the_engine_and_gives_its_reasons(stage: Stage) -> None:
    assert (await stage.get("/ready"))[::2] == (200, b'{"ready":true,"reasons":[]}')
    stage.is_ready = False
    stage.status["reasons"] = ["draining"]
    status, _, body = await stage.get("/ready")
    assert (status, body) == (503, b'{"ready":false,"reasons":["draining"]}')


async def test_metrics_are_what_prometheus_reads(stage: Stage) -> None:
    stage.metrics.add_source(lambda: [GaugeSample("o7s_clients", {}, 5)])
    status, kind, body = await stage.get("/metrics")
    assert status == 200
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\no7s_clients 5.0\n" in body


async def test_status_is_the_engines_own(stage: Stage) -> None:
    assert (await stage.get("/status"))[::2] == (200, b'{"clients":2}')


async def test_what_is_not_there_is_not_there(stage: Stage) -> None:
    assert (await stage.get("/"))[0] == 404
    assert (await stage.get("/status", method="POST"))[0] == 405


async def test_long_headers_are_refused(stage: Stage) -> None:
    assert (await stage.get("/health", headers={"X-Long": "x" * 3000}))[0] == 400
    many = {f"X-{number}": "x" for number in range(100)}
    assert (await stage.get("/health", headers=many))[0] == 400
    assert (await stage.get("/health"))[0] == 200


async def test_without_a_port_it_does_not_listen() -> None:
    admin = Admin(config.Admin(), Stage())
    await admin.start()
    assert admin.port == 0
    await admin.stop()


async def test_a_port_that_is_taken_ends_the_start(stage: Stage) -> None:
    other = Admin(config.Admin(port=stage.admin.port), stage)
    with pytest.raises(OSError, match=r"admin.port .*: Address already in use"):
        await other.start()
    await other.stop()


async def test_it_may_be_stopped_twice(stage: Stage) -> None:
    await stage.admin.stop()
    await stage.admin.stop()
    assert stage.admin.port == 0
