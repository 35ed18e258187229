"""Crowd: clients of organisations, which keep a ledger of what became of each query.

They are ordinary asyncpg programs: they query, connect again when they are thrown
out, and rest a moment when they are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import asyncpg

from bench.judge import Span, certain_excess
from bench.stack import Organization, Stack, until

#: A query's time is Postgres's: after it was admitted, and by the machine's one clock.
QUERY = "SELECT extract(epoch FROM clock_timestamp())::float8"
#: One of many statements, each with a fingerprint of its own.
VARIED = "SELECT extract(epoch FROM clock_timestamp())::float8 AS c{}"
#: What a client does not take for a failure: it was told to send less.
RATE_LIMIT = "53400"
#: Without a SQLSTATE: the connection ended, was refused, or said nothing.
LOST, REFUSED, SILENT = "lost", "refused", "silent"

#: What asyncpg raises beside OSError and TimeoutError; InternalClientError when it
#: queries while it reads that the connection ends.
FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

#: Seconds until all of a crowd have had an answer.
COME_TIMEOUT = 60.0
#: Seconds between tries to connect.
CONNECT_INTERVAL = 0.05
CONNECT_TIMEOUT = 15.0
#: Seconds without an answer after which a client gives up its connection.
QUERY_TIMEOUT = 20.0


@dataclass(slots=True)
class Ledger:
    """What became of the queries of one organisation."""

    began_at: float = field(default_factory=time.time)  # by the machine's clock

    #: Sent, and run by Postgres: seconds since `began_at`.
    answered: list[Span] = field(default_factory=list)
    limited: int = 0
    #: Sent, and nobody knows whether they ran.
    unknown: int = 0
    #: time.time(), and the SQLSTATE or one of the words above; no rate limits.
    errors: list[tuple[float, str]] = field(default_factory=list)

    def note(self, sent_at: float, ran_at: float) -> None:
        # Small numbers, for the judge's sums to be exact.
        self.answered.append((sent_at - self.began_at, ran_at - self.began_at))


class Client:
    """One client, from `run` until it is cancelled."""

    def __init__(
        self, url: str, ledger: Ledger, pause: float, *, is_varied: bool
    ) -> None:
        self.recovered_at = 0.0  # time of the first answer after the latest error
        self._url = url
        self._ledger = ledger
        self._pause = pause  # seconds between queries
        self._is_varied = is_varied  # whether each query is another statement
        self._number = 0  # of the latest varied statement
        self.is_failing = True  # since the latest error, and before the first answer

    async def run(self, leaving: asyncio.Event) -> None:
        """Query until `leaving` is set; then end the connection."""
        while not leaving.is_set():
            try:
                connection = await asyncpg.connect(self._url, timeout=CONNECT_TIMEOUT)
            except (OSError, TimeoutError, *FAILURES) as error:
                self._note(code_of(error))
                await asyncio.sleep(CONNECT_INTERVAL)
                continue
            try:
                await self._use(connection, leaving)
            finally:
                connection.terminate()

    async def _use(
        self, connection: asyncpg.Connection, leaving: asyncio.Event
    ) -> None:
        while not leaving.is_set():
            sent_at = time.time()
            try:
                async with asyncio.timeout(QUERY_TIMEOUT):
                    ran_at = await connection.fetchval(self._statement())
            except asyncpg.PostgresError as error:
                if error.sqlstate == RATE_LIMIT:
                    self._ledger.limited += 1
                else:
                    self._note(code_of(error))
                    if connection.is_closed():
                        self._ledger.unknown += 1
                        return
            except (OSError, TimeoutError, *FAILURES) as error:
                self._ledger.unknown += 1
                self._note(code_of(error))
                return
            else:
                self._ledger.note(sent_at, ran_at)
                if self.is_failing:
                    self.is_failing = False
                    self.recovered_at = time.time()
            await asyncio.sleep(self._pause)

    def _statement(self) -> str:
        if not self._is_varied:
            return QUERY
        self._number += 1
        return VARIED.format(self._number)

    def _note(self, code: str) -> None:
        self.is_failing = True
        self._ledger.errors.append((time.time(), code))


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE of an error, or what happened instead of one."""
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate:
        # asyncpg makes one up where the connection ended without a word.
        return error.sqlstate if getattr(error, "severity", None) else LOST
    if isinstance(error, TimeoutError):
        return SILENT
    return REFUSED if isinstance(error, ConnectionRefusedError) else LOST


@dataclass(frozen=True, slots=True)
class Group:
    """Clients of one organisation."""

    organization: Organization
    count: int
    pause: float = 0.01  # seconds between queries of each
    is_varied: bool = False  # whether each query is another statement


class Crowd:
    """All clients of a run, between `async with`'s ends."""

    def __init__(self, stack: Stack, groups: list[Group]) -> None:
        self.ledgers = {group.organization.handle: Ledger() for group in groups}
        self.clients = [
            Client(
                stack.url(group.organization),
                self.ledgers[group.organization.handle],
                group.pause,
                is_varied=group.is_varied,
            )
            for group in groups
            for _ in range(group.count)
        ]
        self._leaving = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, seconds: float = 0.0) -> None:
        """Let all come within `seconds`, and wait until each has had an answer."""
        for client in self.clients:
            self._tasks.append(asyncio.create_task(client.run(self._leaving)))
            if seconds:
                await asyncio.sleep(seconds / len(self.clients))
        await until(self._have_come, COME_TIMEOUT)

    async def _have_come(self) -> bool:
        for task in self._tasks:
            if task.done():
                task.result()
        return all(client.recovered_at for client in self.clients)

    async def leave(self) -> None:
        """Let all finish their query and go. Raises what a client raised."""
        self._leaving.set()
        await asyncio.gather(*self._tasks)

    def excess(self, handle: str, rate: float, capacity: float) -> float:
        """Tokens beyond the limit that were certainly admitted in the worst window."""
        return certain_excess(self.ledgers[handle].answered, rate, capacity)

    def errors(self) -> Iterator[tuple[float, str]]:
        for ledger in self.ledgers.values():
            yield from ledger.errors


async def room(stack: Stack, organization: Organization, most: int) -> int:
    """Return how many connections get in, trying one more than `most`."""
    async with contextlib.AsyncExitStack() as parts:
        for count in range(most + 1):
            try:
                connection = await connect(stack, organization)
            except (OSError, TimeoutError, *FAILURES):
                return count
            parts.push_async_callback(connection.close)
        return most + 1


async def connect(stack: Stack, organization: Organization) -> asyncpg.Connection:
    """Connect as the organisation. Raises OSError, TimeoutError and `FAILURES`."""
    return await asyncpg.connect(stack.url(organization), timeout=CONNECT_TIMEOUT)
