"""A machine's slots lent to its workers, over real lines and a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import uuid4

import pytest
import pytest_asyncio

from ogelproxy import front, slots
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.config import Secret
from ogelproxy.errors import LineFailed, OgelError, RedisUnavailable
from ogelproxy.front import Front, LineSlots
from ogelproxy.line import Line
from ogelproxy.redis import Redis
from tests.fixtures.redis import Valkey

PATIENCE = 10.0


class Worker:
    """Both ends of a line, and the connections of one organisation at the far one."""

    def __init__(self, front: Front, handle: str) -> None:
        self.front = front
        self.handle = handle
        self.line = Line("worker")  # the supervisor's end
        self.line.on("slot.take", lambda body: front.take(self, body))
        self.line.on("slot.give", lambda body: front.give(self, body))
        self.far = Line("supervisor")
        self.slots: LineSlots[object] = LineSlots(self.far, on_lost=self._lose)
        self.open: list[object] = []
        self.lost: list[OgelError] = []
        self.moved = asyncio.Event()

    def _lose(self, holder: object, error: OgelError) -> None:
        self.open.remove(holder)
        self.lost.append(error)
        self.moved.set()

    async def connect(self) -> None:
        for end, sock in zip((self.line, self.far), socket.socketpair(), strict=True):
            await end.open(sock)

    async def take(self, maximum: int) -> int | None:
        holder = object()
        refused = await self.slots.take(self.handle, holder, maximum, 1)
        if refused is None:
            self.open.append(holder)
        return refused

    def give(self) -> None:
        self.slots.give(self.handle, self.open.pop())

    async def settle(self) -> None:
        """Wait until all that was said has arrived."""
        with contextlib.suppress(OgelError):
            await self.far.ask("nothing", answer_timeout=PATIENCE)


MakeMachine = Callable[[str, int], Awaitable[list[Worker]]]


@pytest_asyncio.fixture
async def machine() -> AsyncIterator[MakeMachine]:
    """Start a machine with so many workers: ``await machine(url, 2)``."""
    made: list[tuple[Redis, Front, list[Worker]]] = []

    async def start(url: str, count: int) -> list[Worker]:
        redis = Redis(RedisConfig(url=Secret(url)))
        shared = Front(redis, is_strict=False)
        await shared.start()
        handle = f"org_{uuid4().hex[:12]}"
        workers = [Worker(shared, handle) for _ in range(count)]
        made.append((redis, shared, workers))
        for worker in workers:
            await worker.connect()
        return workers

    yield start
    for redis, shared, workers in made:
        for worker in workers:
            worker.far.close()
            await worker.line.wait_closed()
        await shared.stop()
        await redis.stop()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_workers_share_a_maximum(valkey: Valkey, machine: MakeMachine) -> None:
    workers = await machine(valkey.url, 2)
    answers = await asyncio.gather(
        *(workers[number % 2].take(30) for number in range(100))
    )
    assert sum(answer is None for answer in answers) == 30
    assert {answer for answer in answers if answer is not None} == {30}
    workers[0].give()
    await workers[0].settle()
    assert await workers[1].take(30) is None
    assert await workers[0].take(30) == 30


async def test_a_worker_that_ends_gives_everything_back_at_once(
    valkey: Valkey, machine: MakeMachine
) -> None:
    a, b = await machine(valkey.url, 2)
    assert [await a.take(3), await a.take(3), await b.take(3)] == [None] * 3
    waiting = [asyncio.create_task(a.take(3)) for _ in range(3)]
    await asyncio.sleep(0)
    a.far.close()
    await a.line.wait_closed()
    a.front.gone(a)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(end) for end in ends} == {LineFailed}
    assert [await b.take(3), await b.take(3), await b.take(3)] == [None, None, 3]


async def test_who_gives_up_waiting_leaves_its_slot_to_others(
    valkey: Valkey, machine: MakeMachine
) -> None:
    a, b = await machine(valkey.url, 2)
    for turns in range(16):
        waiting = asyncio.create_task(a.take(1))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        if a.open:
            a.give()
        await a.settle()
        assert await b.take(1) is None
        b.give()
        await b.settle()


async def test_newest_connections_of_the_machine_end_first(
    valkey: Valkey, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "LEASE_TTL", 0.5)
    monkeypatch.setattr(slots, "RENEWAL_INTERVAL", 0.1)
    a, b = await machine(valkey.url, 2)
    (other,) = await machine(valkey.url, 1)
    other.handle = a.handle
    assert [await w.take(4) for w in (a, b, a, b)] == [None] * 4
    newest, newest_of_a = b.open[-1], a.open[-1]
    await a.front.slots._asking.acquire()  # cut off
    await eventually(lambda: a.front.slots.unproven_count == 4)
    await asyncio.sleep(0.1)  # Redis forgets later
    assert [await other.take(4), await other.take(4)] == [None, None]
    a.front.slots._asking.release()
    async with asyncio.timeout(PATIENCE):
        await a.moved.wait()
        await b.moved.wait()
    assert newest not in b.open
    assert newest_of_a not in a.open
    assert (len(a.open), len(b.open)) == (1, 1)
    assert a.lost[0].sqlstate == "53300"
    assert a.lost[0].detail == "limit=4 count=5"


async def test_workers_are_told_when_redis_is_away(
    own_valkey: Valkey, machine: MakeMachine
) -> None:
    (a,) = await machine(own_valkey.url, 1)
    own_valkey.kill()
    with pytest.raises(RedisUnavailable):
        await a.take(1)


async def test_workers_are_told_how_many_connections_there_are(
    valkey: Valkey, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "TOTALS_INTERVAL", 0.01)
    a, b = await machine(valkey.url, 2)
    assert [await a.take(4), await a.take(4), await b.take(4)] == [None] * 3
    await eventually(
        lambda: (a.slots.total(a.handle), b.slots.total(b.handle)) == (3, 3)
    )
