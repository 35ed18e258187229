"""Questions to the proxies of an arena that pgbench's clients put.

Each is asked by one function, of an arena that was made for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from bench import pgbench
from bench.arena import OURS, OURS_BY_TCP, Arena, Contestant
from bench.case import Result
from bench.pairs import Comparison, Promise, compare, take_turns
from bench.pgbench import Outcome
from ogelproxy.tenants.model import PoolMode

PROTOCOLS = ("simple", "extended", "prepared")
QUICK_PROTOCOLS = ("prepared",)
CLIENTS = (8, 32)
PAIRS, QUICK_PAIRS = 5, 1
#: Of a run of pgbench, whose first is not counted.
SECONDS, QUICK_SECONDS = 4, 2

NOT_MORE = Promise(1.0)
#: One connection may notice a proxy's seven layers by so much.
PING_PONG = Promise(1.05)


Ask = Callable[[Arena, Result, bool], Awaitable[None]]


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
        result.rows.append({"broken": reason})
        if name in (OURS, OURS_BY_TCP):
            result.failures.append(reason)


def cost(mode: PoolMode) -> Ask:
    """Ask for the CPU time of a transaction in a mode of pooling."""

    async def ask(arena: Arena, result: Result, is_quick: bool) -> None:
        table = f"CPU time of a transaction, {mode.value} mode"
        pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if is_quick else (PAIRS, SECONDS)
        for protocol in QUICK_PROTOCOLS if is_quick else PROTOCOLS:
            for clients in CLIENTS[:1] if is_quick else CLIENTS:

                async def measure(
                    each: Contestant, protocol: str = protocol, clients: int = clients
                ) -> Outcome:
                    # A peer that can't prepare in transaction mode does as well as
                    # it can: with a server of its own for each client.
                    can = protocol != "prepared" or each.can_prepare(mode)
                    return await pgbench.run(
                        each.urls[mode if can else PoolMode.SESSION],
                        protocol=protocol,
                        clients=clients,
                        seconds=seconds,
                        cpu=each.cpu_seconds,
                    )

                given, broken = await take_turns(arena.proxies(), measure, pairs)
                note_broken(result, broken)
                note(
                    result,
                    compare(
                        arena,
                        given,
                        lambda outcome: outcome.cpu_microseconds,
                        table=table,
                        what=f"{protocol}, {clients} clients",
                        unit="µs",
                        promise=NOT_MORE,
                    ),
                )

    return ask


async def ping_pong(arena: Arena, result: Result, is_quick: bool) -> None:
    """Ask for the latency of a single client that waits for each answer."""
    pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if is_quick else (PAIRS, SECONDS)

    async def measure(each: Contestant) -> Outcome:
        return await pgbench.run(
            each.urls[PoolMode.TRANSACTION],
            protocol="extended",
            clients=1,
            seconds=seconds,
        )

    given, broken = await take_turns(arena.proxies(), measure, pairs)
    note_broken(result, broken)
    note(
        result,
        compare(
            arena,
            given,
            lambda outcome: 1e6 / outcome.rate,
            table="One connection",
            what="from query to answer",
            unit="µs",
            promise=PING_PONG,
        ),
    )
