"""The case `pool`: many clients, few servers, and how a server comes to the next one.

Runs of ogelproxy and of PgBouncer before the same Postgres take turns.
"""

from __future__ import annotations

import asyncio
import operator
import select
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from bench import peers, sheet
from bench.arena import Arena, Contestant
from bench.case import Case, Result
from bench.pairs import MIN_PAIRS, take_turns
from bench.visitor import Door, Visitor
from ogelproxy.protocol import messages
from ogelproxy.tenants.model import PoolMode

HAND_OVER = "one server, and all wait for it"
CROWD = "four servers, and all come back"
SERVERS = {HAND_OVER: 1, CROWD: 4}
QUICK_PAIRS = 1
#: Clients that wait for the one server, and how often they do in one run.
WAITERS = 50
TIMES, QUICK_TIMES = 40, 5
#: Seconds in which all that were sent have come to stand in the queue.
ARRIVAL = 0.02
#: Clients of the crowd, its seconds, and how long each query keeps a server.
CLIENTS = 64
SECONDS, QUICK_SECONDS = 3.0, 0.5
WORK = messages.query("SELECT pg_sleep(0.001)")
QUERY = messages.query("SELECT 1")
COMMIT = messages.query("COMMIT")
QUEUE_TABLE = f"One server, and {WAITERS} clients wait for it"
FIRST = "from its release to the first one's answer"
GAP = "from one answer to the next one's"
IN_TURN = "answers in the order of coming"
CROWD_TABLE = f"{SERVERS[CROWD]} servers, and {CLIENTS} clients come back for 1 ms"
MOST = "longest wait, of the median"
UNEQUAL = "most queries of a client, of the least"


@dataclass(frozen=True, slots=True)
class Queue:
    """What those who waited for the one server found; medians."""

    first: float  # seconds from the answer to the COMMIT before
    gap: float  # from one answer to the next one, a mean of all
    in_turn: float  # share of answers in the order of coming


@dataclass(frozen=True, slots=True)
class Crowd:
    """What those found who came back as soon as they were served."""

    rate: float  # queries per second
    median: float  # seconds for a query
    most: float
    unequal: float  # the most queries of a client, of the least


class PoolCase(Case):
    name = "pool"
    about = "how soon a server comes to who waits for it, and in which order"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return list(SERVERS)

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_run(result, Path(directory), is_quick))
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        return sheet.tables(results)


CASE = PoolCase()


async def _run(result: Result, directory: Path, is_quick: bool) -> None:
    pairs = QUICK_PAIRS if is_quick else MIN_PAIRS
    question = result.implementation
    kinds = [kind for kind in peers.present() if kind is peers.PgBouncer]
    async with Arena(directory, servers=SERVERS[question], kinds=kinds) as arena:
        if question == HAND_OVER:
            times = QUICK_TIMES if is_quick else TIMES
            queues, _ = await take_turns(
                arena.proxies(),
                lambda rival: asyncio.to_thread(_queue, _door(rival), times),
                pairs,
            )
            tell = partial(sheet.tell, result, arena, queues, table=QUEUE_TABLE)
            tell(lambda its: its.first * 1e6, what=FIRST, unit="µs")
            tell(lambda its: its.gap * 1e6, what=GAP, unit="µs")
            tell(lambda its: its.in_turn * 100, what=IN_TURN, unit="%")
        else:
            seconds = QUICK_SECONDS if is_quick else SECONDS
            crowds, _ = await take_turns(
                arena.proxies(),
                lambda rival: asyncio.to_thread(_crowd, _door(rival), seconds),
                pairs,
            )
            tell = partial(sheet.tell, result, arena, crowds, table=CROWD_TABLE)
            tell(lambda its: its.rate, what="queries", unit="/s")
            tell(lambda its: its.median * 1e3, what="median wait", unit="ms")
            tell(lambda its: its.most / its.median, what=MOST, unit="times")
            tell(lambda its: its.unequal, what=UNEQUAL, unit="times")


def _door(contestant: Contestant) -> Door:
    return Door.of(contestant.urls[PoolMode.TRANSACTION])


def _enter(parts: ExitStack, door: Door, count: int) -> dict[int, Visitor]:
    """Let visitors in, each of whom has had a server; give them by descriptor."""
    inside = {}
    for _ in range(count):
        visitor = Visitor(door).enter()
        parts.callback(visitor.leave)
        visitor.ask("SELECT 1")
        inside[visitor.fileno()] = visitor
    return inside


def _queue(door: Door, times: int) -> Queue:
    """Have all wait for the one server, give it back, and see who is answered when."""
    first, gaps, in_turn = [], [], 0
    with ExitStack() as parts:
        holder = Visitor(door).enter()
        parts.callback(holder.leave)
        waiting = _enter(parts, door, WAITERS)
        epoll = parts.enter_context(select.epoll())
        for descriptor in waiting:
            # Triggered by levels, the kernel would name those first that it named last.
            epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        for _ in range(times):
            holder.ask("BEGIN")
            for visitor in waiting.values():
                visitor.send(QUERY)
            time.sleep(ARRIVAL)
            holder.send(COMMIT)
            holder.answer()
            answered_at = [time.perf_counter()]
            order: list[int] = []
            while len(order) < WAITERS:
                for descriptor, _ in epoll.poll():
                    waiting[descriptor].answer()
                    answered_at.append(time.perf_counter())
                    order.append(descriptor)
            first.append(answered_at[1] - answered_at[0])
            # Of all: where we are late, several are answered at once.
            gaps.append((answered_at[-1] - answered_at[1]) / (WAITERS - 1))
            in_turn += sum(map(operator.eq, order, waiting))
    return Queue(
        statistics.median(first), statistics.median(gaps), in_turn / times / WAITERS
    )


def _crowd(door: Door, seconds: float) -> Crowd:
    """Have all ask again as soon as they are answered."""
    waits = []
    with ExitStack() as parts:
        asking = _enter(parts, door, CLIENTS)
        epoll = parts.enter_context(select.epoll())
        sent_at = {}
        counts = dict.fromkeys(asking, 0)
        begin = time.perf_counter()
        for descriptor, visitor in asking.items():
            epoll.register(descriptor, select.EPOLLIN)
            visitor.send(WORK)
            sent_at[descriptor] = time.perf_counter()
        while sent_at:
            for descriptor, _ in epoll.poll():
                asking[descriptor].answer()
                now = time.perf_counter()
                waits.append(now - sent_at.pop(descriptor))
                counts[descriptor] += 1
                if now - begin < seconds:
                    asking[descriptor].send(WORK)
                    sent_at[descriptor] = now
    elapsed = time.perf_counter() - begin
    return Crowd(
        len(waits) / elapsed,
        statistics.median(waits),
        max(waits),
        max(counts.values()) / min(counts.values()),
    )
