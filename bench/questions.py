"""Questions to the proxies of an arena that pgbench's clients put.

Each is asked by one function, of an arena that was made for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bench import pgbench
from bench.arena import DIRECT, OURS, OURS_BY_TCP, Arena, Contestant
from bench.case import Result
from bench.pairs import Comparison, Promise, compare, take_turns
from bench.pgbench import Outcome, PgbenchFailed
from ogelproxy.tenants.model import PoolMode

PROTOCOLS, QUICK_PROTOCOLS = ("simple", "extended", "prepared"), ("prepared",)
CLIENTS, QUICK_CLIENTS = (8, 32), (8,)
PAIRS, QUICK_PAIRS = 5, 1
#: Of a run of pgbench, whose first is not counted.
SECONDS, QUICK_SECONDS = 4, 3

#: Transactions per second that all can do, and the clients that share them.
RATE, RATED_CLIENTS, RATED_SECONDS = 4000, 16, 8
PERCENTILES = (50, 95, 99)
#: Active clients, and the servers that they share.
CROWD, QUICK_CROWD, CROWD_SERVERS = 1000, 100, 50
#: Pgbench counts its logins as a part of this, at several milliseconds each.
CROWD_SECONDS, QUICK_CROWD_SECONDS = 16, 4

NOT_MORE = Promise(1.0)
#: One connection may notice the layers of a proxy by so much.
PING_PONG = Promise(1.05)

Ask = Callable[[Arena, Result, bool], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Load:
    """What pgbench does to one contestant after the other."""

    protocol: str
    clients: int
    seconds: int
    mode: PoolMode = PoolMode.TRANSACTION
    rate: float | None = None  # transactions per second; as many as can be if None
    has_latencies: bool = True

    async def __call__(self, contestant: Contestant) -> Outcome:
        """Run it. Raises PgbenchFailed, of a transaction that failed too."""
        # A peer that can't prepare in transaction mode does as well as it can: with
        # a server of its own for each client.
        can = self.protocol != "prepared" or contestant.can_prepare(self.mode)
        outcome = await pgbench.run(
            contestant.urls[self.mode if can else PoolMode.SESSION],
            protocol=self.protocol,
            clients=self.clients,
            seconds=self.seconds,
            rate=self.rate,
            has_latencies=self.has_latencies,
            cpu=contestant.cpu_seconds,
        )
        if outcome.failed:
            raise PgbenchFailed(f"{outcome.failed} transactions failed")
        return outcome


def percentile_of(percent: float, scale: float = 1.0) -> Callable[[Outcome], float]:
    """Return what takes a percentile, in milliseconds or `scale` parts of one."""
    return lambda outcome: outcome.percentile(percent) * scale


def note(result: Result, comparisons: list[Comparison]) -> None:
    """Add comparisons to a result."""
    for each in comparisons:
        name = f"{each.table}, {each.what}"
        result.figures[f"{name}, {each.unit}"] = each.ours
        result.figures[f"{name}, ratio to {each.peer}"] = each.ratio
        result.rows.append(each.row())
        if failure := each.failure():
            result.failures.append(failure)


def note_broken(result: Result, broken: dict[str, str]) -> None:
    """Add who could not be measured: a failure where it is us."""
    for name, reason in broken.items():
        result.rows.append({"left out": name, "reason": reason})
        if name in (OURS, OURS_BY_TCP):
            result.failures.append(f"{name}: {reason}")


def cost(mode: PoolMode) -> Ask:
    """Ask for the CPU time of a transaction in a mode of pooling."""

    async def ask(arena: Arena, result: Result, is_quick: bool) -> None:
        pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if is_quick else (PAIRS, SECONDS)
        for protocol in QUICK_PROTOCOLS if is_quick else PROTOCOLS:
            for clients in QUICK_CLIENTS if is_quick else CLIENTS:
                load = Load(protocol, clients, seconds, mode, has_latencies=False)
                given, broken = await take_turns(arena.proxies(), load, pairs)
                note_broken(result, broken)
                compared = compare(
                    arena,
                    given,
                    lambda outcome: outcome.cpu_microseconds,
                    table=f"CPU time of a transaction, {mode.value} mode",
                    what=f"{protocol}, {clients} clients",
                    unit="µs",
                    promise=NOT_MORE,
                )
                note(result, compared)

    return ask


async def ping_pong(arena: Arena, result: Result, is_quick: bool) -> None:
    """Ask for the latency of a single client that waits for each answer."""
    pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if is_quick else (PAIRS, SECONDS)
    load = Load("extended", 1, seconds)
    given, broken = await take_turns(arena.proxies(), load, pairs)
    note_broken(result, broken)
    # What others do on the machine is in the slowest ones.
    figures: tuple[tuple[str, Callable[[Outcome], float], Promise | None], ...] = (
        ("without the slowest tenth", lambda each: each.typical() * 1e3, PING_PONG),
        ("all", lambda each: 1e6 / each.rate, None),
    )
    for what, figure, promise in figures:
        compared = compare(
            arena,
            given,
            figure,
            table="Mean latency of one connection",
            what=what,
            unit="µs",
            promise=promise,
        )
        note(result, compared)


async def added_latency(arena: Arena, result: Result, is_quick: bool) -> None:
    """Ask what latency a proxy adds to Postgres's own, at a rate that all can do."""
    pairs = QUICK_PAIRS if is_quick else PAIRS
    seconds = QUICK_SECONDS if is_quick else RATED_SECONDS
    load = Load("extended", RATED_CLIENTS, seconds, rate=RATE)
    given, broken = await take_turns(arena.everybody(), load, pairs)
    note_broken(result, broken)
    for percent in PERCENTILES:
        # What Postgres itself takes is in both, so one adds no more than the other
        # where this is no more than that.
        compared = compare(
            arena,
            given,
            percentile_of(percent, 1e3),
            table=f"Latency at {RATE:,} transactions per second",
            what=f"P{percent}",
            unit="µs",
            promise=NOT_MORE,
        )
        note(result, compared)
    direct = given.pop(DIRECT, [])
    for name, outcomes in given.items():
        row: dict[str, Any] = {"added by": name}
        for percent in PERCENTILES:
            row[f"P{percent}"] = statistics.median(
                (proxied.percentile(percent) - its.percentile(percent)) * 1e3
                for proxied, its in zip(outcomes, direct, strict=True)
            )
            result.figures[f"added by {name}, P{percent}, µs"] = row[f"P{percent}"]
        row["rate"] = statistics.median(outcome.rate for outcome in outcomes)
        result.rows.append(row)


async def crowd(arena: Arena, result: Result, is_quick: bool) -> None:
    """Ask for the latency of many clients that share few servers, without a pause."""
    clients = QUICK_CROWD if is_quick else CROWD
    pairs = QUICK_PAIRS if is_quick else PAIRS
    seconds = QUICK_CROWD_SECONDS if is_quick else CROWD_SECONDS
    load = Load("extended", clients, seconds)
    given, broken = await take_turns(arena.proxies(), load, pairs)
    note_broken(result, broken)
    for percent, promise in ((50, None), (99, NOT_MORE)):
        compared = compare(
            arena,
            given,
            percentile_of(percent),
            table=f"Latency of {clients:,} clients over {arena.servers} servers",
            what=f"P{percent}",
            unit="ms",
            promise=promise,
        )
        note(result, compared)
