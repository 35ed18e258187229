"""Curves as SVG: all that was measured, and the same file each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import plot
from bench.case import Result

CLIENTS = (1, 8, 64)


def result(*implementations: str) -> Result:
    rows: list[dict[str, Any]] = [
        {
            "curve": "pgbench -S, prepared",
            "implementation": name,
            "x": clients,
            "tps": 1000.0 * clients * number,
            "p50_ms": 0.1 * clients,
            "p99_ms": 0.3 * clients,
        }
        for number, name in enumerate(implementations, 1)
        for clients in CLIENTS
    ]
    return Result("proxy", "curves", rows=[*rows, {"what": "no curve"}])


@pytest.fixture
def svg(tmp_path: Path) -> Path:
    (path,) = plot.draw([result("pgbouncer", "direct", "ogelproxy")], tmp_path)
    return path


def test_a_curve_is_a_file_of_its_name(svg: Path) -> None:
    assert svg.name == "pgbench-s-prepared.svg"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_whom_it_shows_is_there_in_words_and_we_come_first(svg: Path) -> None:
    texts = [text for text in ElementTree.parse(svg).getroot().itertext()]
    shown = [text for text in texts if text in ("pgbouncer", "direct", "ogelproxy")]
    assert shown == ["ogelproxy", "direct", "pgbouncer"]
    assert {"pgbench -S, prepared", "clients", "median", *map(str, CLIENTS)} <= {*texts}


def test_equal_results_give_equal_files(svg: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    plot.draw([result("pgbouncer", "direct", "ogelproxy")], again)
    assert (again / svg.name).read_bytes() == svg.read_bytes()
    plot.draw([result("direct", "ogelproxy")], again)
    assert (again / svg.name).read_bytes() != svg.read_bytes()


def test_no_curves_make_no_files(tmp_path: Path) -> None:
    assert (
        plot.draw([Result("wire", "ogelproxy", {"x, ns": 1.0})], tmp_path / "d") == []
    )
    assert not (tmp_path / "d").exists()
