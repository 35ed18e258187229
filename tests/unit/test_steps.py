"""Steps: what runs in a connection's events, and what in a task."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ogelproxy._connection import Connection
from ogelproxy._reactor import Reactor
from ogelproxy.steps import Steps, in_task

LONG = 60.0


class Rig:
    """A connection, its peer, and what became of the coroutine that owns it."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.crashes: list[Exception] = []
        self.reactor = Reactor(
            asyncio.get_running_loop(), lambda _, error: self.crashes.append(error)
        )
        self.connection = Connection(self.reactor, ours.detach())
        self.ended = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.steps = Steps(self.connection, self._begin, self.ended.set)

    def _begin(self, rest: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(rest))
        return self.tasks[-1]

    def close(self) -> None:
        self.connection.close()
        self.reactor.stop()
        self.peer.close()


def run(check: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    async def checked() -> None:
        rig = Rig()
        try:
            async with asyncio.timeout(LONG):
                await check(rig)
        finally:
            rig.close()
        assert not rig.crashes

    asyncio.run(checked())


def test_waits_for_its_connection_without_a_task() -> None:
    async def check(rig: Rig) -> None:
        taken: list[bytes | None] = []

        async def read_two() -> None:
            for _ in range(2):
                await rig.connection.more()
                taken.append(rig.connection.take(1))

        rig.steps.start(read_two(), LONG)
        assert not taken
        rig.peer.send(b"a")
        rig.reactor.leave()  # there is nobody to wait for
        rig.reactor.turn()
        assert taken == [b"a"]
        rig.peer.send(b"b")
        rig.reactor.leave()  # there is nobody to wait for
        rig.reactor.turn()
        assert taken == [b"a", b"b"]
        assert rig.ended.is_set()
        assert not rig.tasks

    run(check)


def test_goes_on_in_a_task_when_it_waits_for_anything_else() -> None:
    async def check(rig: Rig) -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        got: list[object] = []

        async def ask() -> None:
            got.append(await answer)
            async with asyncio.timeout(LONG):  # for tasks only
                while (taken := rig.connection.take(1)) is None:
                    await rig.connection.more()
            got.append(taken)

        rig.steps.start(ask(), LONG)
        answer.set_result(42)
        rig.peer.send(b"x")
        await rig.ended.wait()
        assert got == [42, b"x"]
        assert len(rig.tasks) == 1

    run(check)


def test_goes_on_in_a_task_when_it_asks_for_one_and_then_stays_there() -> None:
    async def check(rig: Rig) -> None:
        async def ask() -> None:
            assert asyncio.current_task() is None
            await in_task()
            task = asyncio.current_task()
            assert task is rig.tasks[0]
            await in_task()
            await asyncio.sleep(0)
            assert asyncio.current_task() is task

        asyncio.get_running_loop().call_soon(rig.steps.start, ask(), LONG)
        await rig.ended.wait()
        await rig.tasks[0]

    run(check)


def test_tells_before_it_goes_on_in_a_task_or_at_once_where_it_does() -> None:
    async def check(rig: Rig) -> None:
        told: list[tuple[str, int]] = []

        async def ask() -> None:
            for name in ("before", "within"):
                rig.steps.before_task(lambda name=name: told.append((name, tasks())))
                await asyncio.sleep(0)

        def tasks() -> int:
            return len(rig.tasks)

        rig.steps.start(ask(), LONG)
        await rig.ended.wait()
        assert told == [("before", 0), ("within", 1)]

    run(check)


def test_error_of_what_it_waits_for_reaches_it_in_its_task() -> None:
    async def check(rig: Rig) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seen: list[str] = []

        async def ask() -> None:
            try:
                await answer
            except ValueError as error:
                seen.append(str(error))

        rig.steps.start(ask(), LONG)
        answer.set_exception(ValueError("no"))
        await rig.ended.wait()
        assert seen == ["no"]

    run(check)


@pytest.mark.parametrize("waits_for_connection", [True, False])
def test_is_cancelled_where_it_waits_when_its_time_is_over(
    waits_for_connection: bool,
) -> None:
    async def check(rig: Rig) -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seen: list[bool] = []

        async def wait() -> None:
            try:
                await (rig.connection.more() if waits_for_connection else never)
            except asyncio.CancelledError:
                seen.append(rig.steps.is_late)

        rig.steps.start(wait(), 0.01)
        await rig.ended.wait()
        assert seen == [True]
        assert len(rig.tasks) == (not waits_for_connection)

    run(check)


def test_hears_that_its_peer_is_gone() -> None:
    async def check(rig: Rig) -> None:
        seen: list[type[BaseException]] = []

        async def read() -> None:
            try:
                while True:
                    await rig.connection.more()
            except ConnectionResetError as error:
                seen.append(type(error))
                rig.connection.close()

        rig.steps.start(read(), LONG)
        rig.peer.close()
        rig.reactor.leave()  # there is nobody to wait for
        rig.reactor.turn()
        assert seen == [ConnectionResetError]
        assert rig.ended.is_set()

    run(check)


def test_coroutine_that_fails_has_ended_and_tells_whoever_ran_it() -> None:
    async def check(rig: Rig) -> None:
        async def fail() -> None:
            raise ValueError("defect")

        with pytest.raises(ValueError, match="defect"):
            rig.steps.start(fail(), LONG)
        assert rig.ended.is_set()
        assert rig.connection.stepper is None

    run(check)
