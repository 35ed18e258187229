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

from bench import peers, questions
from bench.arena import Arena
from bench.case import Case, Result
from bench.pairs import JUDGED
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
    "one connection": Question(questions.ping_pong),
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
        arena = Arena(directory, servers=question.servers, kinds=kinds)
        async with arena:
            await question.ask(arena, result, is_quick)

    def tables(self, results: Sequence[Result]) -> list[Table]:
        rows = [row for result in results for row in result.rows]
        titles = dict.fromkeys(row["table"] for row in rows if "table" in row)
        return [
            _table(title, [row for row in rows if row.get("table") == title])
            for title in titles
        ]


CASE = ProxyCase()


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
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
            f"{row['ours']:.3g} {row['unit']}",
            row["peer"],
            f"{row['theirs']:.3g} {row['unit']}",
            f"{row['ratio']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            row["promise"],
            KEPT[row["is_kept"]],
        )
    return table
