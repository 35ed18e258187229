"""The line between two processes: requests, notes, their order, and its end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from ogelproxy import line as module
from ogelproxy.errors import LineFailed, OperationRefused
from ogelproxy.line import Line


@pytest_asyncio.fixture
async def lines() -> AsyncIterator[tuple[Line, Line]]:
    """Two ends, the one that the tests ask and the one that they ask with."""
    ends = Line("worker"), Line("supervisor")
    for end, sock in zip(ends, socket.socketpair(), strict=True):
        await end.open(sock)
    yield ends
    for end in ends:
        end.close()
        await end.wait_closed()


Lines = tuple[Line, Line]


async def test_both_ends_ask_and_answer(lines: Lines) -> None:
    left, right = lines
    left.on("add", lambda body: sum(body))
    right.on("name", lambda body: "right")
    assert await right.ask("add", [1, 2], answer_timeout=5) == 3
    assert await left.ask("name", answer_timeout=5) == "right"


async def test_answers_find_who_asked_whatever_their_order(lines: Lines) -> None:
    left, right = lines
    gates = [asyncio.Event() for _ in range(3)]

    async def slow(body: int) -> int:
        await gates[body].wait()
        return body * 10

    left.on("slow", slow)
    asked = [
        asyncio.create_task(right.ask("slow", number, answer_timeout=5))
        for number in range(3)
    ]
    for number in (2, 0, 1):
        gates[number].set()
        assert await asked[number] == number * 10


async def test_notes_and_requests_to_functions_keep_their_order(lines: Lines) -> None:
    left, right = lines
    seen: list[Any] = []
    left.on("note", seen.append)
    left.on("look", lambda body: list(seen))
    for number in range(500):
        right.tell("note", number)
    assert await right.ask("look", answer_timeout=5) == list(range(500))


async def test_a_message_larger_than_any_read_arrives_whole(lines: Lines) -> None:
    left, right = lines
    left.on("same", lambda body: body)
    body = ["ü\n" * 1000] * 1000
    assert await right.ask("same", body, answer_timeout=30) == body


async def test_a_refusal_is_told_and_the_line_goes_on(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    left, right = lines

    def refuse(body: Any) -> None:
        raise OperationRefused("not like that")

    left.on("refuse", refuse)
    with pytest.raises(LineFailed, match="not like that"):
        await right.ask("refuse", answer_timeout=5)
    assert not caplog.records
    with pytest.raises(LineFailed, match="nobody takes 'more'"):
        await right.ask("more", answer_timeout=5)


async def test_a_defect_in_a_coroutine_is_told_and_logged(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    left, right = lines

    async def break_down(body: Any) -> None:
        await asyncio.sleep(0)
        raise KeyError("inside")

    left.on("break", break_down)
    left.on("unsayable", lambda body: object())
    with pytest.raises(LineFailed, match="inside"):
        await right.ask("break", answer_timeout=5)
    with pytest.raises(LineFailed, match="not JSON"):
        await right.ask("unsayable", answer_timeout=5)
    assert len(caplog.records) == 2


async def test_a_closed_line_fails_who_waits_and_who_comes(lines: Lines) -> None:
    left, right = lines
    left.on("never", lambda body: asyncio.sleep(3600))
    asked = asyncio.create_task(right.ask("never", answer_timeout=60))
    await asyncio.sleep(0)
    left.close()
    with pytest.raises(LineFailed, match="supervisor: the line was closed"):
        await asked
    await right.wait_closed()
    assert not right.is_open
    with pytest.raises(LineFailed, match="is closed"):
        await right.ask("never", answer_timeout=1)
    with pytest.raises(LineFailed, match="is closed"):
        right.tell("never")


async def test_a_late_answer_is_nobodys(lines: Lines) -> None:
    left, right = lines
    gate = asyncio.Event()

    async def late(body: Any) -> str:
        await gate.wait()
        return "late"

    left.on("late", late)
    left.on("now", lambda body: "now")
    with pytest.raises(TimeoutError):
        await right.ask("late", answer_timeout=0.01)
    gate.set()
    assert await right.ask("now", answer_timeout=5) == "now"


async def test_requests_without_an_answer_are_bounded(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = lines
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    gate = asyncio.Event()

    async def wait(body: Any) -> None:
        await gate.wait()

    left.on("wait", wait)
    asked = [asyncio.create_task(right.ask("wait", answer_timeout=5)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(LineFailed, match="too many requests"):
        await right.ask("wait", answer_timeout=5)
    gate.set()
    assert await asyncio.gather(*asked) == [None] * 3


async def test_messages_are_bounded_on_both_sides(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = lines
    left.on("long", lambda body: "x" * 200_000)
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 100_000)
    with pytest.raises(LineFailed, match="too long"):
        await right.ask("same", "x" * 200_000, answer_timeout=5)
    with pytest.raises(LineFailed, match="too long"):
        await right.ask("long", answer_timeout=5)


@pytest.mark.parametrize("nonsense", [b"x" * 200_000, b"{]\n"])
async def test_who_speaks_nonsense_is_cut_off(
    nonsense: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 100_000)
    ours, theirs = socket.socketpair()
    end = Line("worker")
    await end.open(ours)
    with theirs:
        theirs.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(theirs, nonsense)
        async with asyncio.timeout(5):
            await end.wait_closed()


async def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNSENT_BYTES", 1_000_000)
    ours, theirs = socket.socketpair()
    with theirs:
        end = Line("worker")
        await end.open(ours)
        with pytest.raises(LineFailed, match="closed"):
            for _ in range(100):
                end.tell("note", "x" * 100_000)
        async with asyncio.timeout(5):
            await end.wait_closed()


def test_it_runs_on_uvloop_too() -> None:
    async def run() -> Any:
        ours, theirs = Line("worker"), Line("supervisor")
        ours.on("same", lambda body: body)
        for end, sock in zip((ours, theirs), socket.socketpair(), strict=True):
            await end.open(sock)
        answer = await theirs.ask("same", "x" * 1_000_000, answer_timeout=5)
        ours.close()
        await theirs.wait_closed()
        return answer

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == "x" * 1_000_000
