"""The supervisor inside a program: places are kept, questions are answered by all."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from ogelproxy import place
from ogelproxy.config import Config
from ogelproxy.errors import ConfigInvalid, WorkerFailed
from ogelproxy.supervisor import Supervisor
from tests.fixtures.faults import eventually
from tests.fixtures.workers import Workers, is_running


@pytest.fixture
def config(own_workers: Workers) -> Config:
    return Config.load(None, own_workers.environment | {"OGELPROXY_WORKERS": "2"})


@pytest.fixture
async def supervisor(config: Config) -> AsyncIterator[Supervisor]:
    async with Supervisor(config) as supervisor:
        yield supervisor


async def replaced(supervisor: Supervisor, pid: int) -> None:
    """Wait until a process is gone and all places are taken."""
    await asyncio.to_thread(
        eventually,
        lambda: supervisor.is_ready and pid not in pids(supervisor),
        timeout=30,
    )


def pids(supervisor: Supervisor) -> list[int]:
    return sorted(process.pid for process in supervisor.processes)


async def test_a_pause_is_short_again_once_a_worker_has_run_a_while(
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(place, "STEADY_INTERVAL", 0.0)
    for _ in range(3):
        pid = next(each.pid for each in supervisor.processes if each.place == 1)
        os.kill(pid, signal.SIGKILL)
        await replaced(supervisor, pid)
    assert caplog.text.count("worker 1 is replaced in 0.1 s") == 3


async def test_all_workers_answer_by_place_and_the_silent_one_is_named(
    supervisor: Supervisor,
) -> None:
    answers = await supervisor.ask_all("status", answer_timeout=10)
    assert [each.process.place for each in answers] == [1, 2]
    assert all(each.body["ready"] for each in answers)
    frozen = answers[0].process
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        silent, other = await supervisor.ask_all("status", answer_timeout=0.5)
        assert silent.body is None
        assert silent.error is not None and "no answer" in silent.error
        assert other.error is None
        alone = await supervisor.ask_all("status", but=frozen)
        assert [each.process for each in alone] == [other.process]
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    (unknown, _) = await supervisor.ask_all("nonsense", answer_timeout=10)
    assert unknown.error is not None and "nobody takes" in unknown.error


async def test_nothing_is_left_of_a_start_that_failed(config: Config) -> None:
    control = config.control.model_copy(update={"secret_key": None})
    broken = Supervisor(config.model_copy(update={"control": control}))
    with pytest.raises(WorkerFailed, match="O7S_SECRET_KEY"):
        await broken.start()
    assert broken.processes == set()
    # Its ports are free for the next.
    async with Supervisor(config) as next_one:
        running = pids(next_one)
    assert not any(map(is_running, running))


async def test_settings_that_are_wrong_change_nothing(
    supervisor: Supervisor, config: Config
) -> None:
    tls = config.tls.model_copy(update={"cert": "/nowhere.pem"})
    with pytest.raises(ConfigInvalid):
        supervisor.reload(config.model_copy(update={"tls": tls}))
    assert supervisor.config is config
