"""Bulk: many rows at once, by SELECT and by COPY.

The client is a bare socket: libpq or a driver would be slower than what is measured.
It logs in by libpq, and then only looks at the end of what comes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psycopg

from bench.arena import Arena, Contestant
from bench.case import Result
from bench.pairs import Promise, compare, take_turns
from bench.pgbench import PgbenchFailed
from bench.questions import PAIRS, QUICK_PAIRS, note, note_broken
from ogelproxy.tenants.model import PoolMode

ROWS, ROW_BYTES = 10_000, 100
MAKE_ROWS = f"""
CREATE TABLE rows (content text);
INSERT INTO rows SELECT repeat('x', {ROW_BYTES}) FROM generate_series(1, {ROWS});
VACUUM ANALYZE rows;
"""
SELECT = "SELECT content FROM rows"
#: Seconds for which the SELECT is repeated.
SECONDS, QUICK_SECONDS = 3.0, 0.5
COPY = "COPY (SELECT content FROM rows, generate_series(1, {times})) TO STDOUT"
COPY_BYTES, QUICK_COPY_BYTES = 500_000_000, 100_000_000

BUFFER_BYTES = 1 << 20
#: Longer than any of these takes.
TIMEOUT = 60.0
#: ReadyForQuery outside of a transaction (manual 54.7). The content has no byte that
#: could be taken for it.
READY = b"Z\0\0\0\5I"
ERROR = b"E"


@dataclass(frozen=True, slots=True)
class Flow:
    """What came in how long, and what CPU time it took the proxy."""

    megabytes: float
    seconds: float
    cpu_seconds: float


FIGURES: tuple[tuple[str, str, Callable[[Flow], float], Promise | None], ...] = (
    (
        "Throughput of many rows",
        "MB/s",
        lambda flow: flow.megabytes / flow.seconds,
        Promise(1.0, is_least=True),
    ),
    (
        "CPU time of many rows",
        "ms/MB",
        lambda flow: flow.cpu_seconds / flow.megabytes * 1e3,
        None,
    ),
)


class Reader:
    """A connection that only counts what comes; use `with`."""

    def __init__(self, url: str) -> None:
        """Log in. Raises psycopg.Error."""
        self._connection = psycopg.connect(url, sslmode="disable", autocommit=True)
        self._socket = socket.socket(fileno=os.dup(self._connection.fileno()))
        self._socket.settimeout(TIMEOUT)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._connection.close()

    def read(self, sql: str) -> int:
        """Run a statement and return the bytes of its answer. Raises OSError."""
        body = sql.encode() + b"\0"
        self._socket.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)
        total, end = 0, b""
        while end != READY:
            count = self._socket.recv_into(self._buffer)
            if not count:
                raise ConnectionResetError("it ended in the middle of an answer")
            if not total and self._buffer[:1] == ERROR:
                raise OSError(bytes(self._buffer[:count]).decode(errors="replace"))
            total += count
            last = bytes(self._buffer[max(0, count - len(READY)) : count])
            end = (end + last)[-len(READY) :]
        return total


def flow(contestant: Contestant, sql: str, seconds: float) -> Flow:
    """Run a statement for `seconds`, at least once. Raises PgbenchFailed."""
    try:
        with Reader(contestant.urls[PoolMode.TRANSACTION]) as reader:
            reader.read("SELECT 1")  # has a server from now on
            total = 0
            cpu, begin = contestant.cpu_seconds(), time.perf_counter()
            while not total or time.perf_counter() - begin < seconds:
                total += reader.read(sql)
            elapsed = time.perf_counter() - begin
            return Flow(total / 1e6, elapsed, contestant.cpu_seconds() - cpu)
    except (OSError, psycopg.Error) as error:
        raise PgbenchFailed(str(error)) from error


async def ask(arena: Arena, result: Result, is_quick: bool) -> None:
    """Ask for the throughput of large answers, and the CPU time that they take."""
    size = QUICK_COPY_BYTES if is_quick else COPY_BYTES
    copy = COPY.format(times=size // (ROWS * ROW_BYTES))
    asked = {
        f"{ROWS:,} rows of {ROW_BYTES} bytes": (
            SELECT,
            QUICK_SECONDS if is_quick else SECONDS,
        ),
        f"COPY of {size // 10**6} MB": (copy, 0.0),
    }
    await arena.execute(MAKE_ROWS)
    for what, (sql, seconds) in asked.items():

        async def measure(
            each: Contestant, sql: str = sql, seconds: float = seconds
        ) -> Flow:
            return await asyncio.to_thread(flow, each, sql, seconds)

        pairs = QUICK_PAIRS if is_quick else PAIRS
        given, broken = await take_turns(arena.proxies(), measure, pairs)
        note_broken(result, broken)
        for table, unit, figure, promise in FIGURES:
            compared = compare(
                *(arena, given, figure),
                table=table,
                what=what,
                unit=unit,
                promise=promise,
            )
            note(result, compared)
