"""Count: the instructions of the micro cases' loops, under callgrind.

Unlike seconds they are the same on a busy machine, so that a regression can fail a
build. They say nothing of the kernel, of caches or of branches guessed wrong, and are
compared only between equal compilers and Pythons.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import orjson
from rich.table import Table

from bench import callgrind, loops, relay, report
from bench.case import ROOT, Result
from bench.micro import OURS, Micro

if TYPE_CHECKING:
    from bench._loops import Loop

#: What markers of the table name.
NAME = "count"
#: `Result.implementation` of what was counted, and the unit of its figures.
COUNTED = "instructions"
#: Passes of the shorter of two runs; the longer has twice as many, and their
#: difference is shown: what is done once is in both.
PASSES = 50
#: Facts of a machine that make equal sources different instructions.
DECISIVE = ("python", "cython", "compiler", "valgrind")

#: The case of which is told where instructions are spent: a whole query.
PROFILED = relay.CASE.name
#: By the names of their object files, with fewer instructions than that left out.
OTHERS = {"libc": "C library", "libpython3": "Python", "_loops": "the loop itself"}
LEAST_SHOWN = 20


def is_possible() -> bool:
    return shutil.which("valgrind") is not None


def count(cases: Sequence[Micro]) -> list[Result]:
    """Count the instructions of a pass through each loop; a result for each case.

    Raises CalledProcessError where that fails, with the reason shown.
    """
    loops.build()
    names = [case.name for case in cases]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "callgrind.out")
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--quiet", "--combine-dumps=yes"),
                "--compress-strings=no",
                # What comes before the loops is not slowed by being counted.
                *("--instr-atstart=no", f"--callgrind-out-file={file}"),
                *(sys.executable, "-m", "bench", *names, "--count", "--answer"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            check=True,
        )
        parts = callgrind.parts(file.read_text())
    results = {name: Result(name, COUNTED) for name in names}
    ran = orjson.loads(done.stdout)
    # `once` and `twice` of each loop, in their order.
    for (name, loop), (_, once), (_, twice) in zip(
        ran, parts[::2], parts[1::2], strict=True
    ):
        twice.subtract(once)
        results[name].figures[f"{loop}, {COUNTED}"] = twice.total() / PASSES
        results[name].rows += [
            {"loop": loop, "module": module, COUNTED: spent / PASSES}
            for module, spent in twice.most_common()
            if PROFILED == name and spent
        ]
    return list(results.values())


def answer(cases: Sequence[Micro]) -> bytes:
    """Run the loops in this process, under callgrind; return which, in order."""
    ran = []
    for case in cases:
        with case.opened(OURS) as opened:
            for name, loop in cast("Mapping[str, Loop]", opened).items():
                loop.instructions(PASSES)
                ran.append((case.name, name))
    return orjson.dumps(ran)


def table(results: Sequence[Result]) -> Table:
    shown = Table(title="Instructions of a pass, without the kernel's")
    shown.add_column("case")
    shown.add_column("loop")
    shown.add_column(COUNTED, justify="right")
    for result in results:
        for figure, spent in result.figures.items():
            loop = figure.removesuffix(f", {COUNTED}")
            shown.add_row(result.case, loop, f"{spent:,.0f}")
    return shown


def profile(results: Sequence[Result]) -> list[Table]:
    """Show where the instructions of a query are spent, where that was counted."""
    spent = {
        (row["module"], row["loop"]): row[COUNTED]
        for result in results
        for row in result.rows
        if result.case == PROFILED
    }
    loops = list(dict.fromkeys(loop for _, loop in spent))
    if not loops:
        return []
    shown = Table(title="Instructions of a query by the module that has them")
    shown.add_column("module")
    for loop in loops:
        shown.add_column(loop, justify="right")
    for module in dict.fromkeys(module for module, _ in spent):
        its = [spent.get((module, loop), 0.0) for loop in loops]
        if max(its) >= LEAST_SHOWN:
            shown.add_row(OTHERS.get(module, module), *(f"{each:,.0f}" for each in its))
    return [shown]


def unlike(name: str) -> str:
    """Say why counts can't be compared with a baseline; empty when they can."""
    then, now = report.baseline(name).facts, report.machine()
    return ", ".join(
        f"{fact} {then.get(fact)} there and {now[fact]} here"
        for fact in DECISIVE
        if then.get(fact) != now[fact]
    )


def regressions(name: str, results: Sequence[Result], percent: float) -> list[str]:
    """Say which counts are more than `percent` above those of a baseline."""
    return [
        f"{case}, {figure}: {now:,.0f}, more than {percent:g} % above {then:,.0f}"
        for case, _, figure, then, now in report.pairs(name, results)
        if now > then * (1 + percent / 100)
    ]
