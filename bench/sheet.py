"""Sheets: rows of a result as tables, each figure ours, and a peer's where it is here.

A row is a `pairs.Comparison`, or an `Own`, which has none to be set beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.table import Table

from bench.arena import OURS, Arena
from bench.case import Result
from bench.pairs import Promise, compare

T = TypeVar("T")

KEPT = {True: "yes", False: "[red]no[/]", None: ""}


@dataclass(frozen=True, slots=True)
class Own:
    """A median of ours."""

    table: str
    what: str
    unit: str
    ours: float
    runs: int
    promise: str = ""  # empty where there is none
    is_kept: bool | None = None  # None where it is not judged


def note(result: Result, own: Own) -> None:
    """Add a figure to a result."""
    result.figures[f"{own.what}, {own.unit}"] = own.ours
    result.rows.append(asdict(own))


def tell(
    result: Result,
    arena: Arena,
    runs: dict[str, list[T]],
    figure: Callable[[T], float],
    *,
    table: str,
    what: str,
    unit: str,
    promise: Promise | None = None,
) -> None:
    """Add a figure of runs that took turns, beside the peers' where there are any."""
    found = compare(
        arena, runs, figure, table=table, what=what, unit=unit, promise=promise
    )
    for each in found:
        result.figures[f"{what}, ratio to {each.peer}"] = each.ratio
        result.rows.append(each.row())
        if failure := each.failure():
            result.failures.append(failure)
    ours = statistics.median(map(figure, runs[OURS]))
    result.figures[f"{what}, {unit}"] = ours
    if not found:
        note(result, Own(table, what, unit, ours, len(runs[OURS])))


def tables(results: Sequence[Result]) -> list[Table]:
    """Show all rows that name a table, each in it."""
    rows = [row for result in results for row in result.rows if "table" in row]
    titles = dict.fromkeys(row["table"] for row in rows)
    return [
        _table(title, [row for row in rows if row["table"] == title])
        for title in titles
    ]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    has_peer = any("peer" in row for row in rows)
    is_promised = any(row["promise"] for row in rows)
    runs = rows[0]["pairs"] if has_peer else rows[0]["runs"]
    of = f"; medians of {runs} {'pairs' if has_peer else 'runs'}" if runs > 1 else ""
    table = Table(title=title + of)
    table.add_column("")
    for name in (
        "ogelproxy",
        *(("peer", "its", "ratio", "least to most") if has_peer else ()),
        *(("must be", "kept") if is_promised else ()),
    ):
        table.add_column(name, justify="left" if name == "peer" else "right")
    for row in rows:
        unit = row["unit"]
        cells = [row["what"], shown(row["ours"], unit)]
        if "peer" in row:
            cells += [
                *(row["peer"], shown(row["theirs"], unit), f"{row['ratio']:.2f}"),
                f"{row['least']:.2f} to {row['most']:.2f}",
            ]
        elif has_peer:
            cells += [""] * 4
        if is_promised:
            cells += [row["promise"], KEPT[row["is_kept"]]]
        table.add_row(*cells)
    return table


def shown(value: float, unit: str) -> str:
    """Write a value with three digits, or all that are before the point."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
