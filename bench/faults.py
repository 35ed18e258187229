"""The case `faults`: what a fault costs, with load running and a checker behind it.

Each fault strikes a stack of its own while clients of several organisations query
through it. Then it has to be shown that no limit was exceeded, that slots are exact
again, that every query was counted once, and what the clients noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymongo.errors import PyMongoError
from rich.table import Table

from bench import proxied
from bench.case import Case, Result
from bench.crowd import FAILURES, LOST, REFUSED, Crowd, Group, connect, room
from bench.stack import Organization, Stack, kill, until
from ogelproxy.embedded_mongodb import is_installed
from ogelproxy.tenants.model import LimiterMode

WORKERS = 2
#: Seconds of load before the fault, and at least after it.
BEFORE, AFTER = 3.0, 4.0
#: Seconds until slots are to be exact and all clients served, after the fault.
HEAL_TIMEOUT = 20.0
#: Seconds that queries may take to be counted: batches, and the search for what
#: processes that are gone left.
COUNT_TIMEOUT = 40.0
#: Seconds after the last was counted, in which none may be counted again.
RECOUNT = 3.0

#: The limits of the tiers that take part: queries per second, and capacity.
LIMITS = {"free": (10.0, 10.0), "starter": (50.0, 250.0), "pro": (200.0, 1000.0)}
CLIENTS = {"free": 3, "starter": 4, "pro": 8}
UNLIMITED_CLIENTS = 8
#: Who watches the slots: connections of the tier, and how many are held meanwhile.
SLOTS_TIER, SLOTS, HELD = "starter", 10, 6

#: A spool that is soon full: two open batches leave little room for closed ones.
SMALL_SPOOL = {
    "OGELPROXY_USAGE_MAX_ROWS": "16000",
    "OGELPROXY_USAGE_MAX_SPOOL_BYTES": "16777216",
}

GONE = frozenset({LOST, "57P01"})  # a connection that ended with its worker


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a stack; `strike` returns when it is over."""

    strike: Callable[[Stack, bool], Awaitable[None]]
    #: What clients may notice: SQLSTATEs, or the words of `crowd`.
    allowed: frozenset[str] = frozenset()
    settings: dict[str, str] = field(default_factory=dict)  # of the proxy
    varied: int = 0  # clients that send ever other statements
    needs_mongo: bool = False


async def _kill_worker(stack: Stack, is_quick: bool) -> None:
    killed = stack.pids()[0]
    os.kill(killed, signal.SIGKILL)

    async def is_replaced() -> bool:
        return killed not in stack.pids() and await stack.is_ready()

    await until(is_replaced, HEAL_TIMEOUT)


async def _freeze_worker(stack: Stack, is_quick: bool) -> None:
    pid = stack.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(5)
    os.kill(pid, signal.SIGCONT)


async def _kill_redis(stack: Stack, is_quick: bool) -> None:
    await kill(stack.valkey)
    await asyncio.sleep(1)
    await stack.valkey.start()


async def _slow_redis(stack: Stack, is_quick: bool) -> None:
    stack.link.delay = 0.2
    await asyncio.sleep(5)
    stack.link.heal()


async def _cut_worker(stack: Stack, is_quick: bool) -> None:
    await stack.cut_redis(stack.pids()[0])
    await asyncio.sleep(5)
    stack.link.heal()


async def _restart_control(stack: Stack, is_quick: bool) -> None:
    await stack.control.stop()
    await asyncio.sleep(2)
    await stack.control.start()


async def _stop_mongo(stack: Stack, is_quick: bool) -> None:
    assert stack.mongo is not None
    await stack.mongo.stop()
    await asyncio.sleep(5 if is_quick else 60)
    await stack.mongo.start()


async def _fill_spool(stack: Stack, is_quick: bool) -> None:
    await stack.control.stop()
    await until(lambda: _is_spool_full(stack), 60)
    await asyncio.sleep(3)
    await stack.control.start()


async def _kill_proxy(stack: Stack, is_quick: bool) -> None:
    await stack.kill_proxy()
    await stack.start_proxy()


async def _roll(stack: Stack, is_quick: bool) -> None:
    old = set(stack.pids())
    stack.roll()

    async def are_gone() -> bool:
        return not old & set(stack.pids()) and await stack.is_ready()

    await until(are_gone, 60)


FAULTS = {
    "a worker is killed (-9)": Fault(_kill_worker, GONE),
    "a worker is frozen for 5 s": Fault(_freeze_worker),
    "Redis is killed and back empty": Fault(_kill_redis),
    "Redis takes 200 ms for 5 s": Fault(_slow_redis),
    "Redis is cut from one worker for 5 s": Fault(_cut_worker),
    "the control plane's Postgres restarts": Fault(_restart_control),
    "MongoDB is away for a minute": Fault(_stop_mongo, needs_mongo=True),
    "the usage spool is full": Fault(_fill_spool, settings=SMALL_SPOOL, varied=4),
    # 53300: for up to 10 s the connections that it had are counted beside the new.
    "the whole proxy is killed (-9)": Fault(_kill_proxy, GONE | {REFUSED, "53300"}),
    "all workers are replaced": Fault(_roll, GONE),
}


async def _is_spool_full(stack: Stack) -> bool:
    workers = (await stack.status())["workers"]
    return all(each["status"]["usage_spool"] == "full" for each in workers)


@dataclass(slots=True)
class Finding:
    """What a fault did."""

    excess: float = -math.inf  # tokens of the worst window of all organisations
    slots_after: float = 0.0  # seconds until exactly as many get in as may
    served_after: float = 0.0  # seconds until each client had an answer again
    answered: int = 0
    limited: int = 0  # refused by the limiter
    counted: int = 0
    unknown: int = 0  # queries without an answer: they may have run, or not
    errors: Counter[str] = field(default_factory=Counter)  # by SQLSTATE
    errors_for: float = 0.0  # seconds from the begin of the fault to the last error
    failures: list[str] = field(default_factory=list)


async def examine(stack: Stack, fault: Fault, *, is_quick: bool) -> Finding:
    """Let a fault strike a stack under load, and see what it did."""
    found = Finding()
    limited = await stack.make(list(LIMITS))
    free, watched = await stack.make(["enterprise", SLOTS_TIER], mode=LimiterMode.OFF)
    groups = [Group(each, CLIENTS[each.tier]) for each in limited]
    groups.append(Group(free, UNLIMITED_CLIENTS))
    if fault.varied:
        groups.append(Group(free, fault.varied, 0.002, is_varied=True))
    crowd = Crowd(stack, groups)
    await crowd.start()
    held = [await connect(stack, watched) for _ in range(HELD)]
    await asyncio.sleep(BEFORE)

    began_at = time.time()
    await fault.strike(stack, is_quick)
    ended_at = time.time()
    for connection in held:
        connection.terminate()
    await _watch_slots(stack, watched, found)
    found.slots_after = time.time() - ended_at
    await _until_served(crowd, found)
    found.served_after = max(
        0.0, max(client.recovered_at for client in crowd.clients) - ended_at
    )
    await asyncio.sleep(max(0.0, ended_at + AFTER - time.time()))
    await crowd.leave()

    for each in limited:
        rate, capacity = LIMITS[each.tier]
        excess = crowd.excess(each.handle, rate, capacity)
        found.excess = max(found.excess, excess)
        if excess > proxied.ROUNDING:
            found.failures.append(f"{each.tier} was {excess:.1f} over its limit")
    found.errors = Counter(code for _, code in crowd.errors())
    found.errors_for = max(
        (moment - began_at for moment, _ in crowd.errors()), default=0.0
    )
    for code in found.errors.keys() - fault.allowed:
        found.failures.append(f"clients were told {code}")
    await _count(stack, crowd, [*limited, free], found)
    return found


async def _watch_slots(stack: Stack, watched: Organization, found: Finding) -> None:
    """Wait until exactly as many connections get in as may."""
    count = 0

    async def is_exact() -> bool:
        nonlocal count
        count = await room(stack, watched, SLOTS)
        return count >= SLOTS

    try:
        await until(is_exact, HEAL_TIMEOUT)
    except TimeoutError:
        found.failures.append(f"only {count} of {SLOTS} slots came back")
    if count > SLOTS:
        found.failures.append(f"{count} connections got in, {SLOTS} may")


async def _until_served(crowd: Crowd, found: Finding) -> None:
    async def are_served() -> bool:
        return not any(client.is_failing for client in crowd.clients)

    try:
        await until(are_served, HEAL_TIMEOUT)
    except TimeoutError:
        found.failures.append("not all clients are served again")


async def _count(
    stack: Stack,
    crowd: Crowd,
    organizations: Sequence[Organization],
    found: Finding,
) -> None:
    """Compare what clients were answered with what was counted, for each."""
    counted = {}
    for each in organizations:
        ledger = crowd.ledgers[each.handle]
        await _until_counted(stack, each, len(ledger.answered))
    await asyncio.sleep(RECOUNT)
    for each in organizations:
        ledger = crowd.ledgers[each.handle]
        answered = len(ledger.answered)
        counted[each.handle] = await stack.billed(each)
        if not answered <= counted[each.handle] <= answered + ledger.unknown:
            found.failures.append(
                f"{each.tier}: {answered} queries were answered, of {ledger.unknown} "
                f"nobody knows, and {counted[each.handle]} were counted"
            )
        recorded = await stack.recorded(each)
        if recorded not in (None, counted[each.handle]):
            found.failures.append(
                f"{each.tier}: {counted[each.handle]} were billed, {recorded} recorded"
            )
        found.answered += answered
        found.limited += ledger.limited
        found.unknown += ledger.unknown
        found.counted += counted[each.handle]


async def _until_counted(stack: Stack, organization: Organization, count: int) -> None:
    """Wait until so many queries are in all sinks, or for long enough."""

    async def are_counted() -> bool:
        try:
            counts = (
                await stack.billed(organization),
                await stack.recorded(organization),
            )
        except (OSError, PyMongoError, *FAILURES):
            return False
        return all(each is None or each >= count for each in counts)

    with contextlib.suppress(TimeoutError):
        await until(are_counted, COUNT_TIMEOUT)


class FaultsCase(Case):
    name = "faults"
    about = "what each fault costs: limits, slots, usage, clients"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [
            name
            for name, fault in FAULTS.items()
            if is_installed() or not fault.needs_mongo
        ]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        fault = FAULTS[implementation]
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            found = asyncio.run(self._run(fault, Path(directory), is_quick))
        result = Result(self.name, implementation)
        result.figures = {
            "worst excess, tokens": found.excess,
            "slots exact after, s": found.slots_after,
            "all served after, s": found.served_after,
            "client errors": found.errors.total(),
            "client errors for, s": found.errors_for,
            "queries answered": found.answered,
            "queries limited": found.limited,
            "queries counted": found.counted,
            "queries of unknown fate": found.unknown,
        }
        result.rows = [{"errors": dict(found.errors)}]
        result.failures = [f"{implementation}: {each}" for each in found.failures]
        return result

    async def _run(self, fault: Fault, directory: Path, is_quick: bool) -> Finding:
        async with Stack(directory, workers=WORKERS, settings=fault.settings) as stack:
            return await examine(stack, fault, is_quick=is_quick)

    def tables(self, results: Sequence[Result]) -> list[Table]:
        table = Table(title=f"Faults, with {WORKERS} workers under load")
        table.add_column("fault")
        for column in (
            *("worst excess", "slots exact after", "answered", "counted"),
            *("unknown", "client errors", "for", "all served after"),
        ):
            table.add_column(column, justify="right")
        for result in results:
            figures = result.figures
            errors = result.rows[0]["errors"]
            named = ", ".join(f"{count} x {code}" for code, count in errors.items())
            table.add_row(
                result.implementation,
                f"{figures['worst excess, tokens']:.1f}",
                f"{figures['slots exact after, s']:.1f} s",
                f"{figures['queries answered']:.0f}",
                f"{figures['queries counted']:.0f}",
                f"{figures['queries of unknown fate']:.0f}",
                named or "none",
                f"{figures['client errors for, s']:.1f} s" if errors else "-",
                f"{figures['all served after, s']:.1f} s",
            )
        return [table]


CASE = FaultsCase()
