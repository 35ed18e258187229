"""Rows of several workers, over real lines: in pages, and without who is silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest

from ogelproxy.console.peers import MAX_PAGE_BYTES, MAX_TICKETS, Peers
from ogelproxy.errors import LineFailed
from ogelproxy.line import MAX_MESSAGE_BYTES, Line

ROW = ("C", "org_somebody", "org_somebody/database", "none", "idle", "127.0.0.1") * 4


class Machine:
    """Workers, and what a supervisor does between them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []  # the supervisor's ends
        self.frozen: set[int] = set()  # places whose worker doesn't answer
        self.longest = 0  # bytes of the longest answer to a worker

    async def hire(self, count: int) -> list[Peers]:
        workers = []
        for place in range(1, count + 1):
            ours, theirs = socket.socketpair()
            line, end = Line(f"worker {place}"), Line("the supervisor")
            line.on("everyone", lambda body, place=place: self._everyone(place, body))
            workers.append(Peers(end, count, place))
            await line.open(ours)
            await end.open(theirs)
            self.lines.append(line)
        return workers

    async def _everyone(self, asker: int, body: Mapping[str, Any]) -> list[Any]:
        told = []
        for place, line in enumerate(self.lines, 1):
            if place == asker or place not in (body["pids"] or {place}):
                continue
            told.append({"place": place, "pid": place})
            if place in self.frozen:
                told[-1]["error"] = "no answer within 1 s"
                continue
            try:
                said = await line.ask(body["name"], body["body"], answer_timeout=5.0)
            except LineFailed as error:
                told[-1]["error"] = str(error)
            else:
                told[-1]["body"] = said
        self.longest = max(self.longest, len(orjson.dumps(told)))
        return told

    async def close(self) -> None:
        for line in self.lines:
            line.close()
            await line.wait_closed()


@contextlib.asynccontextmanager
async def machine(count: int) -> AsyncIterator[tuple[Machine, list[Peers]]]:
    made = Machine()
    try:
        yield made, await made.hire(count)
    finally:
        await made.close()


async def test_who_is_alone_asks_nobody() -> None:
    peers = Peers(None, 1, None)
    peers.add_source("table", lambda about: [(about, 1)])
    assert await peers.gather("table", "x") == ([("x", 1)], [])
    assert not peers.has_others


async def test_a_table_of_many_clients_comes_in_pages() -> None:
    async with machine(2) as (made, (one, other)):
        one.add_source("table", lambda about: [(0, *ROW)])
        other.add_source("table", lambda about: [(n, *ROW) for n in range(60_000)])
        rows, silent = await one.gather("table", "clients")
        assert silent == []
        assert len(rows) == 60_001
        assert [row[0] for row in rows] == [0, *range(60_000)]
        whole = len(orjson.dumps(rows))
        assert whole > MAX_MESSAGE_BYTES / 2
        assert made.longest < MAX_PAGE_BYTES * 2


async def test_pages_of_all_workers_fit_into_one_message() -> None:
    async with machine(40) as (made, workers):
        for peers in workers:
            peers.add_source("table", lambda about: [ROW] * 2000)
        rows, silent = await workers[0].gather("table")
        assert (len(rows), silent) == (80_000, [])
        assert made.longest < MAX_MESSAGE_BYTES


async def test_who_is_silent_is_named_and_asked_no_more() -> None:
    async with machine(3) as (made, workers):
        for peers in workers:
            peers.add_source("table", lambda about: [ROW] * 5000)
        made.frozen.add(2)
        rows, silent = await workers[0].gather("table")
        assert len(rows) == 10_000
        assert silent == ["worker 2 (process 2): no answer within 1 s"]


async def test_a_supervisor_that_is_gone_is_named() -> None:
    async with machine(2) as (made, (one, _)):
        one.add_source("table", lambda about: [ROW])
        await made.close()
        rows, silent = await one.gather("table")
        assert len(rows) == 1
        assert "the supervisor" in silent[0]


async def test_rows_that_nobody_fetches_are_given_up() -> None:
    async with machine(2) as (made, (one, other)):
        other.add_source("table", lambda about: [ROW] * 3)
        one.add_source("table", lambda about: [])
        line = made.lines[1]
        for number in range(MAX_TICKETS + 1):
            told = await line.ask(
                "rows", ["table", None, f"t{number}", 1], answer_timeout=5.0
            )
            assert (len(told["rows"]), told["is_more"]) == (1, True)
        with pytest.raises(LineFailed, match="given up"):
            await line.ask("rows.more", ["t0", 1], answer_timeout=5.0)
        for is_more in (True, False):
            told = await line.ask("rows.more", ["t1", 1], answer_timeout=5.0)
            assert told["is_more"] is is_more


async def test_all_do_something_at_once() -> None:
    async with machine(3) as (made, workers):
        meeting = asyncio.Barrier(2)

        async def act(about: str) -> str:
            if about == "meet":
                await meeting.wait()
            return about

        for peers in workers:
            peers.add_act("act", act)
        heard = await workers[0].act("act", "x")
        assert (heard.answers, heard.silent) == (["x"] * 3, [])
        made.frozen.add(3)
        heard = await workers[0].act("act", "meet", answer_timeout=5.0)
        assert heard.answers == ["meet"] * 2
        assert len(heard.silent) == 1
