"""The case `proxy`: ogelproxy with all seven layers on, beside other proxies.

An implementation here is a question, not a proxy: what is told is a ratio of runs
that took turns before the same Postgres, so all proxies of a question run side by
side, each in processes of its own; one that isn't asked sleeps. A question has a
fresh set of all servers.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import bulk, curves, peers, questions
from bench.arena import Arena
from bench.case import Case, Result
from bench.pairs import JUDGED
from bench.questions import PERCENTILES, RATE
from ogelproxy.tenants.model import PoolMode

#: What both PgBouncer and ogelproxy have per pool until told otherwise.
SERVERS = 20
#: How tables say whether a promise was kept; too few pairs don't tell.
KEPT = {True: "yes", False: "[red]no[/]", None: ""}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, how many servers each pool has, and if the short form asks."""

    ask: questions.Ask
    servers: int = SERVERS
    is_quick: bool = True


QUESTIONS = {
    "cost": Question(questions.cost(PoolMode.TRANSACTION)),
    "cost of sessions": Question(
        questions.cost(PoolMode.SESSION),
        servers=max(questions.CLIENTS),
        is_quick=False,
    ),
    "one connection": Question(questions.ping_pong, is_quick=False),
    "latency": Question(questions.added_latency),
    "rows": Question(bulk.ask),
    "crowd": Question(questions.crowd, servers=questions.CROWD_SERVERS),
    "curves": Question(curves.ask, is_quick=False),
}


class ProxyCase(Case):
    name = "proxy"
    about = "all seven layers, beside proxies that have but one: CPU, latency, rows"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [
            name
            for name, question in QUESTIONS.items()
            if question.is_quick or not is_quick
        ]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(self._run(result, Path(directory), is_quick))
        return result

    async def _run(self, result: Result, directory: Path, is_quick: bool) -> None:
        question = QUESTIONS[result.implementation]
        kinds = [
            kind for kind in peers.present() if not is_quick or kind.name == JUDGED
        ]
        if not kinds:
            result.failures.append("no peer is here: name one by --peer")
            return
        async with Arena(directory, servers=question.servers, kinds=kinds) as arena:
            questions.note_broken(result, arena.absent)
            if len(arena.absent) == len(kinds):
                result.failures += arena.absent.values()
                return
            await question.ask(arena, result, is_quick)

    def tables(self, results: Sequence[Result]) -> list[Table]:
        rows = [row for result in results for row in result.rows]
        titles = dict.fromkeys(row["table"] for row in rows if "table" in row)
        tables = [
            _comparisons(title, [row for row in rows if row.get("table") == title])
            for title in titles
        ]
        for kind, make in (
            ("added by", _added),
            ("curve", _curves),
            ("left out", _out),
        ):
            if found := [row for row in rows if kind in row]:
                tables.append(make(found))
        return tables

    def summary(self, results: Sequence[Result]) -> list[Table]:
        rows = [row for result in results for row in result.rows if row.get("promise")]
        return [_summary(rows)] if rows else []


CASE = ProxyCase()


def _comparisons(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{title}; medians of {rows[0]['pairs']} pairs")
    table.add_column("")
    table.add_column("ogelproxy", justify="right")
    table.add_column("peer")
    for name in ("its", "ratio", "least to most", "must be"):
        table.add_column(name, justify="right")
    table.add_column("kept")
    for row in rows:
        table.add_row(
            row["what"],
            f"{_short(row['ours'])} {row['unit']}",
            row["peer"],
            f"{_short(row['theirs'])} {row['unit']}",
            f"{row['ratio']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            row["promise"],
            KEPT[row["is_kept"]],
        )
    return table


def _short(figure: float) -> str:
    """Write a figure with the digits that may mean something."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _added(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Latency added at {RATE:,} transactions per second")
    table.add_column("by")
    names = [f"P{percent}" for percent in PERCENTILES]
    for name in (*names, "transactions/s"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (f"{row[name]:,.0f} µs" for name in names)
        table.add_row(row["added by"], *cells, f"{row['rate']:,.0f}")
    return table


def _curves(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Throughput and latency, {rows[0]['curve']}")
    table.add_column("clients", justify="right")
    table.add_column("")
    for name in ("transactions/s", "P50", "P99"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(f"{row['x']}", row["implementation"], f"{row['tps']:,.0f}"),
            *(f"{row['p50_ms']:.2f} ms", f"{row['p99_ms']:.2f} ms"),
        )
    return table


def _out(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Left out")
    table.add_column("who")
    table.add_column("since")
    for row in rows:
        table.add_row(row["left out"], row["reason"])
    return table


def _summary(rows: Sequence[dict[str, Any]]) -> Table:
    """What was promised, all of it beside one peer."""
    table = Table()
    table.add_column("")
    table.add_column("ogelproxy", justify="right")
    table.add_column(rows[0]["peer"], justify="right")
    table.add_column("ratio", justify="right")
    for row in rows:
        table.add_row(
            f"{row['table']}, {row['what']}",
            *(f"{_short(row[whose])} {row['unit']}" for whose in ("ours", "theirs")),
            f"{row['ratio']:.2f}",
        )
    return table
