"""Pages: tables and plots in Markdown files, between markers of their case.

    <!-- bench proxy -->
    <!-- end of bench proxy -->

What is between them is written anew; all else of a file is somebody's prose. With
`proxy, in short` for the name it is the summary of the case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Pages:
    """The files that results go to, and the machine that these are of."""

    files: Sequence[Path]
    #: As `report.machine` returns them.
    facts: Mapping[str, Any]

    def check(self, name: str) -> None:
        """Raise LookupError if a file has no markers of a case."""
        for file in self.files:
            _markers(file, name)

    def put(
        self,
        name: str,
        tables: Sequence[Table],
        *,
        summary: Sequence[Table] = (),
        plots: Sequence[Path] = (),
    ) -> None:
        """Put the tables of a case, or its summary, into each file.

        Plots are linked to below the tables. Raises LookupError as `check` does.
        """
        for file in self.files:
            for marker in _markers(file, name):
                if marker == name:
                    self._put(file, marker, tables, plots)
                elif summary:
                    self._put(file, marker, summary, ())

    def _put(
        self, file: Path, marker: str, tables: Sequence[Table], plots: Sequence[Path]
    ) -> None:
        before, after = _halves(file, marker)
        on = f"{self.facts['cores']} x {self.facts['cpu']}"
        links = [
            f"![{plot.stem}]({os.path.relpath(plot.resolve(), file.resolve().parent)})"
            for plot in plots
        ]
        measured = (
            f"Measured on {on}, kernel {self.facts['kernel']}, at "
            f"{self.facts['commit']}."
        )
        parts = [before, *map(_markdown, tables), *links, measured, after]
        file.write_text("\n\n".join(parts))


def _markers(file: Path, name: str) -> list[str]:
    """Say which markers of a case a file has; raises LookupError for none."""
    found = []
    for marker in (name, f"{name}, in short"):
        with contextlib.suppress(LookupError):
            _halves(file, marker)
            found.append(marker)
    if not found:
        _halves(file, name)
    return found


def _halves(file: Path, marker: str) -> tuple[str, str]:
    """Split a file around what is between markers; raises LookupError without."""
    begin, end = f"<!-- bench {marker} -->", f"<!-- end of bench {marker} -->"
    before, found, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise LookupError(f"{file} has no {begin} before {end}")
    return before + begin, end + after


def _markdown(table: Table) -> str:
    columns = [
        [Text.from_markup(str(cell)).plain.replace("|", r"\|") for cell in column.cells]
        for column in table.columns
    ]
    heads = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [heads, rules, *zip(*columns, strict=True)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    title = Text.from_markup(str(table.title)).plain if table.title else ""
    return f"{title}:\n\n{lines}" if title else lines
