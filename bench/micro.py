"""Micro: cases of things too small to be timed one by one.

Each is a loop. It is timed in rounds, all loops in turn, and the least of a loop's
rounds is shown: what disturbs it only ever adds. `count` counts the instructions
of the same loops.
"""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

from rich.table import Table

from bench import loops
from bench.case import Case, Result

OURS = "ogelproxy"
TWIN = "plain twin"
ROUNDS = 15
QUICK_ROUNDS = 5
ROUND_SECONDS = 0.01

#: Does something so many times; a compiled `Loop`, or plain Python.
Repeated = Callable[[int], object]


class Micro(Case):
    """A case made of loops; one of `OURS` is compiled and calls as the proxy does."""

    title: ClassVar[str]
    #: What one pass through a loop is.
    unit: ClassVar[str]
    #: What the loops of `OURS` do.
    names: ClassVar[Sequence[str]]

    @abstractmethod
    def opened(
        self, implementation: str
    ) -> AbstractContextManager[Mapping[str, Repeated]]:
        """Make the loops of an implementation, by what they do."""

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [OURS, TWIN]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        loops.build()
        result = Result(self.name, implementation)
        with self.opened(implementation) as opened:
            spent = _spent(opened, QUICK_ROUNDS if is_quick else ROUNDS)
        for name, rounds in spent.items():
            result.figures[f"{name}, ns"] = min(rounds)
            result.rows.append(
                {
                    "loop": name,
                    "least_ns": min(rounds),
                    "median_ns": statistics.median(rounds),
                }
            )
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        table = Table(title=self.title)
        table.add_column(self.unit)
        for result in results:
            table.add_column(result.implementation, justify="right")
        for figure in dict.fromkeys(name for each in results for name in each.figures):
            spent = [result.figures.get(figure) for result in results]
            cells = ("-" if ns is None else f"{ns:,.0f} ns" for ns in spent)
            table.add_row(figure.removesuffix(", ns"), *cells)
        return [table]


def repeated(once: Callable[[], object]) -> Repeated:
    """Make a loop of a Python function."""

    def loop(count: int) -> None:
        for _ in range(count):
            once()

    return loop


def _spent(opened: Mapping[str, Repeated], rounds: int) -> dict[str, list[float]]:
    """Return nanoseconds of a pass in each round."""
    counts = {name: _passes(loop) for name, loop in opened.items()}
    spent: dict[str, list[float]] = {name: [] for name in opened}
    # One after the other in each round: a busy moment slows each a little.
    for _ in range(rounds):
        for name, loop in opened.items():
            spent[name].append(_nanoseconds(loop, counts[name]))
    return spent


def _passes(loop: Repeated) -> int:
    """How many passes take as long as a round."""
    count = 1
    while (once := _nanoseconds(loop, count)) * count < ROUND_SECONDS * 1e9:
        count = max(2 * count, int(ROUND_SECONDS * 1e9 / once))
    return count


def _nanoseconds(loop: Repeated, count: int) -> float:
    begin = time.perf_counter_ns()
    loop(count)
    return (time.perf_counter_ns() - begin) / count
