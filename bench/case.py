"""Case: one question to measure, and the implementations that answer it.

Each implementation runs in a process of its own, so that none warms, slows or
breaks another; `measure` starts it and reads its answer, `answer` is what runs
there. How results look is `report`'s.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import orjson
from rich.table import Table

ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class Result:
    """What one implementation of one case gave."""

    case: str
    implementation: str
    #: By name with the unit; what `--compare` sets side by side.
    figures: dict[str, float] = field(default_factory=dict)
    #: Promises that were not kept, as sentences; any makes the run end with 1.
    failures: list[str] = field(default_factory=list)
    #: Details that only the JSON shows.
    rows: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_bytes: int = 0  # of the implementation's own process


class Case(ABC):
    """A case; the modules of this package that end in one define it as `CASE`."""

    name: ClassVar[str]
    #: One line for --help.
    about: ClassVar[str]

    @abstractmethod
    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        """Name what is measured, in order."""

    @abstractmethod
    def run(self, implementation: str, *, is_quick: bool) -> Result:
        """Measure one; called in a fresh process, in its main thread."""

    @abstractmethod
    def tables(self, results: Sequence[Result]) -> list[Table]:
        """Show results of this case, all with figures, to people."""

    def summary(self, results: Sequence[Result]) -> list[Table]:
        """What of the tables is for those who read about more than speed."""
        return []


def measure(case: Case, implementation: str, *, is_quick: bool) -> Result:
    """Run one implementation in a fresh process.

    One that ends without an answer has no figures, and that as its failure.
    """
    command = [sys.executable, "-m", "bench", case.name, "--only", implementation]
    if is_quick:
        command.append("--quick")
    done = subprocess.run(
        [*command, "--answer"], cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        failure = f"{implementation}: ended with status {done.returncode}"
        return Result(case.name, implementation, failures=[failure])
    return Result(**orjson.loads(done.stdout))


def answer(case: Case, implementation: str, *, is_quick: bool) -> bytes:
    """Measure in this process; return what `measure` reads."""
    result = case.run(implementation, is_quick=is_quick)
    # KiB on Linux (getrusage(2)).
    result.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return orjson.dumps(asdict(result))
