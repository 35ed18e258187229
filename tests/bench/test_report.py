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
    path = report.save(
        "before", report.to_json([result(2.0)], report.machine(), is_quick=False)
    )
    assert set(orjson.loads(path.read_bytes())["machine"]) >= {"cpu", "commit"}
    assert cells(report.comparison("before", [result(3.0)])) == [
        *(["case"], ["ours"], ["seconds"]),
        *(["2"], ["3"], ["1.50"]),
    ]


def test_help_tells_of_every_case() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    for case in CASES.values():
        assert case.about in shown.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("wire --compare instructions --fail-above 5", "goes with --count"),
        ("wire --count --fail-above 5", "and --compare"),
        ("limits --count", "of loops only"),
        ("wire --count --only ogelproxy", "of loops only"),
        ("wire --compare nothing", "no baseline nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    arguments: str, reason: str
) -> None:
    shown = CliRunner().invoke(main, arguments.split())
    assert shown.exit_code == 2
    assert reason in shown.output


def test_without_valgrind_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    shown = CliRunner().invoke(main, ["wire", "--count"])
    assert shown.exit_code == 0
    assert "valgrind is missing" in shown.output
