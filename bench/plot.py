"""Plot: throughput and latency over the number of clients, as SVG.

Drawn from rows of results that name a curve, such as

    {"curve": "select only", "implementation": "ogelproxy", "x": 8, "tps": 25000.0,
     "p50_ms": 0.3, "p99_ms": 0.9}

Equal rows give equal files, to be kept in git.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.case import Result

GREY = "#555555"
#: Of Okabe and Ito, told apart by the colour-blind; the first is ours, the second of
#: no proxy at all, and those behind them of peers as they come.
COLOURS = ("#0072b2", GREY, "#d55e00", "#009e73", "#cc79a7", "#e69f00")
FIRST = ("ogelproxy", "direct")
MARKERS = "osD^vP"
STYLE: Any = {
    # Text stays text: smaller, and the same wherever it is drawn.
    "svg.fonttype": "none",
    # Ids in the file come from it, not from chance.
    "svg.hashsalt": "ogelproxy",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Draw each curve of results into a file of its own; return the files.

    The directory is made where it is missing. Results without curves draw nothing.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for row in result.rows:
            if "curve" in row:
                curves.setdefault(row["curve"], []).append(row)
    if curves:
        directory.mkdir(parents=True, exist_ok=True)
    return [_draw(name, rows, directory) for name, rows in curves.items()]


def _draw(name: str, rows: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    path = directory / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"
    implementations = _in_order(row["implementation"] for row in rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        throughput, latency = figure.subplots(1, 2)
        for number, implementation in enumerate(implementations):
            its = sorted(
                (row for row in rows if row["implementation"] == implementation),
                key=lambda row: row["x"],
            )
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 4,
                "linewidth": 1.6,
            }
            clients = [row["x"] for row in its]
            throughput.plot(
                clients, [row["tps"] for row in its], label=implementation, **look
            )
            latency.plot(clients, [row["p50_ms"] for row in its], **look)
            latency.plot(
                clients, [row["p99_ms"] for row in its], linestyle="--", **look
            )
        throughput.set_title("transactions per second", loc="left")
        throughput.set_ylim(bottom=0)
        latency.set_title("latency, milliseconds", loc="left")
        latency.set_yscale("log")
        latency.legend(
            handles=[
                Line2D([], [], color=GREY, linestyle="-", label="median"),
                Line2D([], [], color=GREY, linestyle="--", label="99th percentile"),
            ],
            frameon=False,
        )
        for axes in (throughput, latency):
            _count_clients(axes, sorted({row["x"] for row in rows}))
        figure.suptitle(name, x=0.01, ha="left", weight="bold")
        figure.legend(
            loc="outside lower center", ncols=len(implementations), frameon=False
        )
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # It leaves blanks at ends of lines, which git complains of.
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines))
    return path


def _count_clients(axes: Axes, clients: Sequence[int]) -> None:
    axes.set_xlabel("clients")
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients)
    axes.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _in_order(names: Iterable[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [*(name for name in FIRST if name in found)] + [
        name for name in found if name not in FIRST
    ]
