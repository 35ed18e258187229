"""Tables and plots in Markdown: between their markers, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.table import Table

from bench import count, report
from bench.__main__ import CASES, main
from bench.case import ROOT, Result
from bench.pages import Pages

FACTS = {"cores": 2, "cpu": "a processor", "kernel": "6.1", "commit": "abc"}
PAGES = (ROOT / "docs/performance.md", ROOT / "docs/reliability.md")
MARKER = re.compile(r"<!-- bench (.*?) -->\n.*?<!-- end of bench \1 -->", re.DOTALL)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- bench x -->\nold\n<!-- end of bench x -->\nb\n")
    return path


@pytest.fixture
def table() -> Table:
    table = Table("name")
    table.add_column("value", justify="right")
    table.add_row("one", "[green]1[/]")
    return table


def test_a_table_replaces_what_is_between_its_markers(page: Path, table: Table) -> None:
    for _ in range(2):
        Pages([page], FACTS).put("x", [table], plots=[page.parent / "plots/a.svg"])
        assert page.read_text() == (
            "a\n<!-- bench x -->\n\n| name | value |\n| --- | ---: |\n| one | 1 |\n\n"
            "![a](plots/a.svg)\n\nMeasured on 2 x a processor, kernel 6.1, at abc.\n\n"
            "<!-- end of bench x -->\nb\n"
        )


def test_a_page_may_have_the_summary_only(tmp_path: Path, table: Table) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench x, in short -->\n<!-- end of bench x, in short -->\n")
    before = page.read_text()
    Pages([page], FACTS).put("x", [table])
    assert page.read_text() == before
    Pages([page], FACTS).put("x", [], summary=[table])
    assert "| one | 1 |" in page.read_text()


def test_a_page_without_markers_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    pages = Pages([path], FACTS)
    with pytest.raises(LookupError):
        pages.check("x")
    with pytest.raises(LookupError):
        pages.put("x", [])
    assert path.read_text() == "nothing\n"


def test_results_that_were_written_are_shown_again(tmp_path: Path) -> None:
    name, shown_by = "bucket", tmp_path / "page.md"
    shown_by.write_text(f"<!-- bench {name} -->\n<!-- end of bench {name} -->\n")
    file = tmp_path / "results.json"
    results = [Result(name, "ogelproxy", {"taken, ns": 12345.0})]
    file.write_bytes(report.to_json(results, FACTS, is_quick=True))
    arguments = ["--from", str(file), "--document", str(shown_by)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "| taken | 12,345 ns |" in shown_by.read_text()
    assert "Measured on 2 x a processor, kernel 6.1, at abc." in shown_by.read_text()


def test_each_case_has_one_place_in_the_documents() -> None:
    names = [name for page in PAGES for name in MARKER.findall(page.read_text())]
    assert len(names) == len(set(names))
    assert {*CASES, count.NAME} == set(names)


def test_the_readme_has_a_place_for_what_proxies_have_in_common() -> None:
    Pages([ROOT / "README.md"], FACTS).check("proxy")
