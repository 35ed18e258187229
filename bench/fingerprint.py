"""The case `fingerprint`: what a fingerprint costs, and what it groups.

Speed is beside the plain twin of the tests and libpg_query, which parses. Grouping
is beside libpg_query's, the one that tools for Postgres agree on; where they differ,
the differences are counted by what would undo them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pglast.parser import ParseError
from pglast.parser import fingerprint as libpg_query
from rich.markup import escape
from rich.table import Table

from bench import corpus, grouping, loops, rewritings
from bench.case import Result
from bench.exchanges import POINT_QUERY
from bench.micro import OURS, TWIN, Micro, Repeated, repeated
from ogelproxy._fingerprint import scan
from tests import reference

#: What is measured for speed; the first is what it costs to begin and to end.
CLASSES = {
    "nothing": "",
    "point query": POINT_QUERY,
    "query of an ORM": (
        'SELECT "shop_order"."id", "shop_order"."customer_id", "shop_order"."placed", '
        '"shop_order"."total", "shop_customer"."id", "shop_customer"."email" '
        'FROM "shop_order" INNER JOIN "shop_customer" '
        'ON ("shop_order"."customer_id" = "shop_customer"."id") '
        'WHERE ("shop_order"."placed" >= $1 AND "shop_customer"."email" = $2) '
        'ORDER BY "shop_order"."placed" DESC LIMIT 20'
    ),
    "IN of 1,000": (
        f"SELECT * FROM items WHERE id IN ({', '.join(map(str, range(1000)))})"
    ),
    "INSERT of 1,000 rows": "INSERT INTO items (id, name, price) VALUES "
    + ", ".join(f"({n}, 'item {n}', {n}.99)" for n in range(1000)),
    "comments": "/* controller='orders', action='show', route='/orders/:id' */ "
    + "SELECT 1 -- by the night job\n"
    + "/* traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01' */",
    "dollar quotes": f"DO $body$ BEGIN {'PERFORM refresh(1); ' * 200}END $body$",
}
#: Beside ours, which is called in C.
CALLED: dict[str, Callable[[str], object]] = {
    "libpg_query": libpg_query,
    TWIN: lambda sql: reference.scan(sql.encode()),
}
SPEED = (OURS, *CALLED)
GROUPING = "grouping of "
OWN = GROUPING + "our own statements"
REGRESSION = GROUPING + "Postgres's regression files"

#: Nanoseconds; spec section 9 has 1 µs for limiter, accounting and this together.
MAX_POINT_QUERY = 1000.0
#: Characters of an example that tables show.
EXAMPLE_LENGTH = 48


class FingerprintCase(Micro):
    name = "fingerprint"
    about = "cheap, and grouping what belongs together: beside libpg_query"
    title = "Time of a fingerprint; least of all rounds"
    unit = "statement"
    names = tuple(CLASSES)

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [*SPEED, OWN, *([] if is_quick else [REGRESSION])]

    @contextmanager
    def opened(self, implementation: str) -> Iterator[Mapping[str, Repeated]]:
        if implementation == OURS:
            scans = loops.load().Scans
            yield {name: scans(sql.encode()) for name, sql in CLASSES.items()}
            return
        called = CALLED[implementation]
        yield {name: repeated(partial(called, sql)) for name, sql in CLASSES.items()}

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        if implementation in SPEED:
            result = super().run(implementation, is_quick=is_quick)
            if (
                implementation == OURS
                and result.figures["point query, ns"] > MAX_POINT_QUERY
            ):
                result.failures.append("a point query takes more than 1 µs")
            return result
        if implementation == OWN:
            files = corpus.files_of(corpus.OWN)
        elif implementation == REGRESSION:
            files = corpus.regression_files()
        else:
            files = corpus.files_of(Path(implementation.removeprefix(GROUPING)))
        return self._run_grouping(implementation, corpus.statements(files))

    def _run_grouping(self, implementation: str, statements: list[str]) -> Result:
        judged: list[str] = []
        ours: list[Hashable] = []
        theirs: list[Hashable] = []
        refused = 0
        for statement in statements:
            found = scan(statement.encode())
            if not found.statements:
                continue
            try:
                key = libpg_query(statement)
            except ParseError:
                refused += 1
                continue
            judged.append(statement)
            ours.append(found.fingerprint)
            theirs.append(key)
        agreement = grouping.compare(zip(ours, theirs, strict=True))
        result = Result(self.name, implementation)
        result.figures = {
            "statements": agreement.statements,
            "groups": agreement.one_groups,
            "groups of libpg_query": agreement.other_groups,
            "pairs in both": agreement.both_pairs,
            "pairs only here": agreement.one_pairs,
            "pairs only in libpg_query": agreement.other_pairs,
            "refused by libpg_query": refused,
        }
        for only_in, coarse, fine, known in (
            ("ogelproxy", ours, theirs, rewritings.coarser_than_libpg_query()),
            ("libpg_query", theirs, ours, rewritings.finer_than_libpg_query()),
        ):
            reasons, left = grouping.explain(judged, coarse, fine, known)
            result.rows += [
                {"only_in": only_in, **asdict(reason)} for reason in (*reasons, left)
            ]
        if not judged:
            result.failures.append(f"{implementation}: there are no statements")
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        speed = [result for result in results if result.implementation in SPEED]
        grouped = [result for result in results if result.implementation not in SPEED]
        return [
            *([_speed_table(speed)] if speed else []),
            *([_grouping_table(grouped)] if grouped else []),
            *map(_reasons_table, grouped),
        ]


CASE = FingerprintCase()


def _speed_table(results: Sequence[Result]) -> Table:
    table = Table(title=FingerprintCase.title)
    table.add_column("statement")
    table.add_column("bytes", justify="right")
    for result in results:
        table.add_column(result.implementation, justify="right")
        table.add_column("per byte", justify="right")
    for name, sql in CLASSES.items():
        size = len(sql.encode())
        cells = []
        for result in results:
            spent = result.figures[f"{name}, ns"]
            per_byte = f"{spent / size:,.2f} ns" if size else "-"
            cells += [f"{spent:,.0f} ns", per_byte]
        table.add_row(name, f"{size:,}", *cells)
    return table


def _grouping_table(results: Sequence[Result]) -> Table:
    table = Table(title="Pairs of statements that are grouped")
    table.add_column("statements of")
    names = ("different", "refused", "groups", "libpg_query's", "pairs in both")
    for name in (*names, "only here", "only there"):
        table.add_column(name, justify="right")
    for result in results:
        its = result.figures
        figures = (
            *(its["statements"], its["refused by libpg_query"]),
            *(its["groups"], its["groups of libpg_query"]),
            *(its["pairs in both"], its["pairs only here"]),
            its["pairs only in libpg_query"],
        )
        source = result.implementation.removeprefix(GROUPING)
        table.add_row(source, *(f"{figure:,.0f}" for figure in figures))
    return table


def _reasons_table(result: Result) -> Table:
    source = result.implementation.removeprefix(GROUPING)
    table = Table(title=f"Why they differ in {source}")
    for name in ("together only in", "differing in"):
        table.add_column(name)
    table.add_column("pairs", justify="right")
    table.add_column("for example")
    for row in result.rows:
        if row["pairs"]:
            table.add_row(
                *(row["only_in"], row["name"], f"{row['pairs']:,}", _example(row))
            )
    return table


def _example(row: dict[str, Any]) -> str:
    def short(statement: str) -> str:
        text = " ".join(rewritings.without_comments(statement).split())
        if len(text) > EXAMPLE_LENGTH:
            text = f"{text[: EXAMPLE_LENGTH - 1]}…"
        return escape(text)

    return " / ".join(map(short, row["example"])) if row["example"] else ""
