"""Curves: throughput and latency over the number of clients, to be drawn.

With few clients a proxy is waited for, with many it is the bottleneck or Postgres is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.arena import Arena
from bench.case import Result
from bench.pairs import take_turns
from bench.pgbench import Outcome
from bench.questions import QUICK_SECONDS, Load, note_broken, percentile_of

CURVE = "extended queries, transaction mode"
CLIENTS, QUICK_CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 16)
ROUNDS, QUICK_ROUNDS = 3, 1
SECONDS = 3
FIGURES: dict[str, Callable[[Outcome], float]] = {
    "tps": lambda outcome: outcome.rate,
    "p50_ms": percentile_of(50),
    "p99_ms": percentile_of(99),
}


async def ask(arena: Arena, result: Result, is_quick: bool) -> None:
    """Add a row per contestant and number of clients."""
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if is_quick else (ROUNDS, SECONDS)
    for clients in QUICK_CLIENTS if is_quick else CLIENTS:
        load = Load("extended", clients, seconds)
        given, broken = await take_turns(arena.everybody(), load, rounds)
        note_broken(result, broken)
        for name, outcomes in given.items():
            row: dict[str, Any] = {
                "curve": CURVE,
                "implementation": name,
                "x": clients,
            }
            for figure, take in FIGURES.items():
                row[figure] = statistics.median(map(take, outcomes))
                result.figures[f"{clients} clients, {name}, {figure}"] = row[figure]
            result.rows.append(row)
