"""The case `scale`: what a second worker brings.

Two proxies take turns, of one worker and of two, each before a Postgres of its own.
Where there are two cores for pgbench, Postgres and the workers, twice the throughput
isn't there to be had. What is counted instead is capacity: transactions per second
of CPU time of the busiest worker, which is what a proxy would do whose workers have
a core each. What workers lose to each other is in it, and so are connections that
the kernel spreads unevenly; what they lose for want of cores is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from bench import pgbench, sheet
from bench.arena import DATABASE, MAKE_TIER, TIER
from bench.case import Case, Result
from bench.pairs import MIN_PAIRS
from bench.sheet import Own
from bench.stack import Stack
from ogelproxy.config import Secret
from ogelproxy.tenants.model import DatabaseType, PoolMode

WORKERS = (1, 2)
QUICK_PAIRS = 1
#: Of a run of pgbench, whose first is not counted.
SECONDS, QUICK_SECONDS = 6, 4
#: So many that the kernel's choice of a worker for each comes out nearly even.
CLIENTS = 256
#: Capacity of two workers, of that of one; spec section 9 has 0.9 of each.
MIN_RATIO = 1.8
TABLE = "Two workers, and one"
CAPACITY = "transactions per CPU second of the busiest worker"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of pgbench gave."""

    rate: float  # transactions per second
    cpu_seconds: list[float]  # of each worker, per second
    busiest_share: float  # of the clients, of the worker that has most of them

    @property
    def capacity(self) -> float:
        """Transactions per second of CPU time of the busiest worker."""
        return self.rate / max(self.cpu_seconds)


class ScaleCase(Case):
    name = "scale"
    about = "what a second worker brings"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return ["two workers"]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_run(result, Path(directory), is_quick))
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        return sheet.tables(results)


CASE = ScaleCase()


async def _run(result: Result, directory: Path, is_quick: bool) -> None:
    pairs = QUICK_PAIRS if is_quick else MIN_PAIRS
    seconds = QUICK_SECONDS if is_quick else SECONDS
    runs: dict[int, list[Run]] = {count: [] for count in WORKERS}
    async with contextlib.AsyncExitStack() as parts:
        sides = {}
        for count in WORKERS:
            place = directory / str(count)
            place.mkdir(mode=0o711)
            stack = Stack(place, workers=count, has_history=False)
            # Not by the stack's link to it, whose time would be ours.
            stack.settings["REDIS_URL"] = stack.valkey.url
            await parts.enter_async_context(stack)
            sides[count] = stack, await _prepare(stack)
        for _ in range(pairs):
            for count, (stack, url) in sides.items():
                runs[count].append(await _measure(stack, url, seconds))
    _tell(result, runs[1], runs[2])


async def _prepare(stack: Stack) -> str:
    """Make what pgbench reads; return where it comes in."""
    await pgbench.prepare(stack.postgres.dsn())
    await stack.store.pool.execute(MAKE_TIER, TIER)
    [organization] = await stack.make([TIER])
    await stack.store.create_database(
        *(organization.handle, DATABASE, DatabaseType.POSTGRES),
        *(Secret(stack.postgres.local_dsn()), PoolMode.TRANSACTION),
        actor="bench",
    )
    return stack.url(organization, DATABASE)


async def _measure(stack: Stack, url: str, seconds: int) -> Run:
    workers = [psutil.Process(pid) for pid in stack.pids()]
    marks: list[list[float]] = []
    shares: list[float] = []

    def look() -> float:
        times = [worker.cpu_times() for worker in workers]
        marks.append([each.user + each.system for each in times])
        clients = [_clients(worker, stack.port) for worker in workers]
        shares.append(max(clients) / max(sum(clients), 1))
        return sum(marks[-1])

    outcome = await pgbench.run(
        url, protocol="prepared", clients=CLIENTS, seconds=seconds, cpu=look
    )
    spent = [
        (after - before) / outcome.seconds
        for before, after in zip(marks[0], marks[-1], strict=True)
    ]
    return Run(outcome.rate, spent, shares[0])


def _clients(worker: psutil.Process, port: int) -> int:
    connections = worker.net_connections("tcp4")
    return sum(each.laddr.port == port and bool(each.raddr) for each in connections)


def _tell(result: Result, alone: list[Run], together: list[Run]) -> None:
    def ratio(figure: Callable[[Run], float]) -> float:
        pairs = zip(alone, together, strict=True)
        return statistics.median(figure(two) / figure(one) for one, two in pairs)

    capacity = ratio(lambda run: run.capacity)
    kept = capacity >= MIN_RATIO if len(alone) >= MIN_PAIRS else None
    cost = ratio(lambda run: sum(run.cpu_seconds) / run.rate)
    rate = ratio(lambda run: run.rate)
    share = statistics.median(run.busiest_share for run in together) * 100
    unjudged = ("", None)
    rate_name = f"transactions per second, of {os.cpu_count()} cores in all"
    for what, unit, value, (promise, is_kept) in (
        (CAPACITY, "times", capacity, (f"≥ {MIN_RATIO}", kept)),
        ("CPU time of a transaction, over all workers", "times", cost, unjudged),
        ("clients of the worker that has most", "%", share, unjudged),
        (rate_name, "times", rate, unjudged),
    ):
        sheet.note(result, Own(TABLE, what, unit, value, len(alone), promise, is_kept))
    if kept is False:
        result.failures.append(f"two workers have {capacity:.2f} times one's capacity")
