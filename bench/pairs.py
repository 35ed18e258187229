"""Pairs: contestants that take turns, and the ratio of what neighbours in time gave.

A shared machine is slow for minutes at a time. What two proxies gave within the same
seconds has a ratio that says something; its median over pairs says it reliably, and
the least and the most of the pairs say how much so.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from bench.arena import Arena, Contestant
from bench.pgbench import PgbenchFailed

T = TypeVar("T")

#: Fewer pairs than that judge nothing.
MIN_PAIRS = 5
#: The peer that promises are made about; others are shown.
JUDGED = "pgbouncer"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a median ratio of ours to a peer's has to be."""

    ratio: float
    is_least: bool = False  # else it is the most that is allowed

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {self.ratio:.2f}"

    def is_kept(self, ratio: float) -> bool:
        return ratio >= self.ratio if self.is_least else ratio <= self.ratio


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians of ours and of a peer's figure, and of the pairs' ratios."""

    table: str
    what: str
    unit: str
    ours: float
    peer: str  # with its version
    theirs: float
    ratio: float
    least: float
    most: float
    pairs: int
    promise: str  # empty where there is none
    is_kept: bool | None  # None where it is not judged

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def failure(self) -> str | None:
        """Say that the promise is broken, where it is."""
        if self.is_kept is not False:
            return None
        return f"{self.table}, {self.what}: {self.ratio:.3f} of {self.peer}'s"


async def take_turns(
    contestants: Sequence[Contestant],
    measure: Callable[[Contestant], Awaitable[T]],
    rounds: int,
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Measure each in each round, in turn there and back; return what each gave.

    Who fails is left out from then on, and named with the reason.
    """
    given: dict[str, list[T]] = {each.name: [] for each in contestants}
    broken: dict[str, str] = {}
    for number in range(rounds):
        for each in contestants if number % 2 == 0 else reversed(contestants):
            if each.name in broken:
                continue
            try:
                given[each.name].append(await measure(each))
            except (PgbenchFailed, TimeoutError) as error:
                broken[each.name] = repr(error)
    return {name: of for name, of in given.items() if name not in broken}, broken


def compare(
    arena: Arena,
    given: dict[str, list[T]],
    figure: Callable[[T], float],
    *,
    table: str,
    what: str,
    unit: str,
    promise: Promise | None = None,
) -> list[Comparison]:
    """Set a figure of ours beside that of each peer which has given one."""
    found = []
    for peer in arena.contestants.values():
        if peer.beside not in given or peer.name not in given:
            continue
        ours = [figure(each) for each in given[peer.beside]]
        theirs = [figure(each) for each in given[peer.name]]
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        asked = promise if peer.name == JUDGED else None
        ratio = statistics.median(ratios)
        found.append(
            Comparison(
                table=table,
                what=what,
                unit=unit,
                ours=statistics.median(ours),
                peer=f"{peer.name} {peer.version}",
                theirs=statistics.median(theirs),
                ratio=ratio,
                least=min(ratios),
                most=max(ratios),
                pairs=len(ratios),
                promise=str(asked or ""),
                is_kept=(
                    asked.is_kept(ratio) if asked and len(ratios) >= MIN_PAIRS else None
                ),
            )
        )
    return found
