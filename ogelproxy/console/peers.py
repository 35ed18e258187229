"""Peers: the other workers of the machine, for whom one of them answers.

Rows come in pages, so that no message between two processes is long however many
clients there are: `rows` [kind, about, ticket, bytes] is answered with the first
page and whether there is more, `rows.more` [ticket, bytes] with the next. Who asks
names the ticket. `act` [what, about] is answered when it is done.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ogelproxy.errors import LineFailed
from ogelproxy.line import MAX_MESSAGE_BYTES, Line

#: Seconds that a worker may take to answer.
ANSWER_TIMEOUT = 1.0
#: Seconds beyond it until the supervisor itself is taken for silent.
SUPERVISOR_TIMEOUT = 1.0
#: Bytes of rows in a page, at most: a few milliseconds for each process it passes.
MAX_PAGE_BYTES = 256 * 1024
#: Pages of all workers are one answer; encoded again, it has room in one message.
PAGES_PER_MESSAGE = 4
#: Tables that wait to be asked for more, and seconds in which all of one has to be.
MAX_TICKETS = 64
TICKET_TTL = 30.0

Row = Sequence[Any]
#: Makes rows of what JSON knows.
Source = Callable[[Any], Iterable[Row]]
#: Does something and says what came of it.
Act = Callable[[Any], Coroutine[Any, Any, Any]]


@dataclass(slots=True)
class Heard:
    """What peers answered, and who did not."""

    answers: list[Any] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)  # whose answers they are
    silent: list[str] = field(default_factory=list)  # a text for each of these


class Peers:
    """The workers of the machine, this one among them; others only with a line."""

    def __init__(self, line: Line | None, worker_count: int, place: int | None) -> None:
        #: Of this worker, from 1; None where it is the only one.
        self.place = place
        self._line = line
        room = MAX_MESSAGE_BYTES // PAGES_PER_MESSAGE // worker_count
        self._page_bytes = min(MAX_PAGE_BYTES, room)
        self._sources: dict[str, Source] = {}
        self._acts: dict[str, Act] = {}
        self._tickets: dict[str, deque[Row]] = {}  # rows yet to be told
        self._numbers = itertools.count(1)
        if line is not None:
            line.on("rows", self._rows)
            line.on("rows.more", self._more)
            line.on("act", self._act)

    @property
    def has_others(self) -> bool:
        return self._line is not None

    def add_source(self, kind: str, source: Source) -> None:
        """Have this worker tell rows of a kind."""
        self._sources[kind] = source

    def add_act(self, what: str, act: Act) -> None:
        """Have this worker do something when it is asked to."""
        self._acts[what] = act

    async def gather(self, kind: str, about: Any = None) -> tuple[list[Row], list[str]]:
        """Return the rows of all workers, this one's first, and who is missing."""
        rows: list[Row] = list(self._sources[kind](about))
        if self._line is None:
            return rows, []
        ticket = f"{os.getpid()}.{next(self._numbers)}"
        heard = await self._ask("rows", [kind, about, ticket, self._page_bytes])
        silent = heard.silent
        while heard.answers:
            unfinished = []
            for pid, page in zip(heard.pids, heard.answers, strict=True):
                rows += page["rows"]
                if page["is_more"]:
                    unfinished.append(pid)
            if not unfinished:
                break
            heard = await self._ask("rows.more", [ticket, self._page_bytes], unfinished)
            silent += heard.silent
        return rows, silent

    async def act(
        self, what: str, about: Any = None, *, answer_timeout: float = ANSWER_TIMEOUT
    ) -> Heard:
        """Have all workers do something at once; this one's answer comes first."""
        others, own = await asyncio.gather(
            self._ask("act", [what, about], answer_timeout=answer_timeout),
            self._acts[what](about),
        )
        return Heard([own, *others.answers], [os.getpid(), *others.pids], others.silent)

    async def tell(self, name: str, body: Any) -> Any:
        """Ask the supervisor itself. Raises LineFailed, TimeoutError."""
        assert self._line is not None
        timeout = ANSWER_TIMEOUT + SUPERVISOR_TIMEOUT
        return await self._line.ask(name, body, answer_timeout=timeout)

    async def _ask(
        self,
        name: str,
        body: Any,
        pids: list[int] | None = None,
        *,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> Heard:
        """Ask the others, or those with these process ids."""
        heard = Heard()
        if self._line is None:
            return heard
        question = {"name": name, "body": body, "timeout": answer_timeout, "pids": pids}
        try:
            told = await self._line.ask(
                "everyone", question, answer_timeout=answer_timeout + SUPERVISOR_TIMEOUT
            )
        except (LineFailed, TimeoutError) as error:
            reason = str(error) or "no answer"
            heard.silent.append(f"the supervisor and the other workers: {reason}")
            return heard
        for each in told:
            if "error" in each:
                worker = f"worker {each['place']} (process {each['pid']})"
                heard.silent.append(f"{worker}: {each['error']}")
            else:
                heard.answers.append(each["body"])
                heard.pids.append(each["pid"])
        return heard

    # What others ask of this one.

    def _rows(self, body: tuple[str, Any, str, int]) -> dict[str, Any]:
        kind, about, ticket, size = body
        rows = deque(self._sources[kind](about))
        page = self._page(rows, ticket, size)
        if rows:
            loop = asyncio.get_running_loop()
            loop.call_later(TICKET_TTL, self._tickets.pop, ticket, None)
        return page

    def _more(self, body: tuple[str, int]) -> dict[str, Any]:
        ticket, size = body
        rows = self._tickets.pop(ticket, None)
        if rows is None:
            raise LineFailed("the rest of the rows was given up")
        return self._page(rows, ticket, size)

    def _page(self, rows: deque[Row], ticket: str, size: int) -> dict[str, Any]:
        page = []
        while rows and size > 0:
            page.append(rows.popleft())
            size -= len(orjson.dumps(page[-1]))
        if rows:
            if len(self._tickets) >= MAX_TICKETS:
                del self._tickets[next(iter(self._tickets))]
            self._tickets[ticket] = rows
        return {"rows": page, "is_more": bool(rows)}

    def _act(self, body: tuple[str, Any]) -> Coroutine[Any, Any, Any]:
        what, about = body
        return self._acts[what](about)
