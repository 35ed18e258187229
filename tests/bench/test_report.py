"""What is kept of results: JSON, baselines, tables in documents."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner
from rich.table import Table

from bench import report
from bench.__main__ import CASES, main
from bench.case import Result


def result(seconds: float) -> Result:
    return Result("case", "ours", {"seconds": seconds})


def cells(table: Table) -> list[list[str]]:
    return [[str(cell) for cell in column.cells] for column in table.columns]


def test_results_are_compared_with_those_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "BASELINES", tmp_path / "baselines")
    path = report.save("before", report.to_json([result(2.0)], is_quick=False))
    assert set(orjson.loads(path.read_bytes())["machine"]) >= {"cpu", "commit"}
    assert cells(report.comparison("before", [result(3.0)])) == [
        *(["case"], ["ours"], ["seconds"]),
        *(["2"], ["3"], ["1.50"]),
    ]


def test_a_table_replaces_what_is_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- bench x -->\nold\n<!-- end of bench x -->\nb\n")
    table = Table("name")
    table.add_column("value", justify="right")
    table.add_row("one", "[green]1[/]")
    for _ in range(2):
        report.document(path, "x", [table])
        text = path.read_text()
        assert text.startswith(
            "a\n<!-- bench x -->\n\n| name | value |\n| --- | ---: |"
        )
        assert "| one | 1 |" in text and "old" not in text
        assert text.endswith("<!-- end of bench x -->\nb\n")


def test_a_document_without_markers_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    with pytest.raises(LookupError):
        report.document(path, "x", [])
    assert path.read_text() == "nothing\n"


def test_help_tells_of_every_case() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    for case in CASES.values():
        assert case.about in shown.output
