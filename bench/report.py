"""Report: results as JSON, beside the machine they are of, and set side by side.

A saved result is a file in `baselines/`, named by who saved it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from bench.case import ROOT, Result
from ogelproxy.embedded import find_binaries
from ogelproxy.embedded_valkey import find_valkey
from ogelproxy.errors import EmbeddedFailed

BASELINES = Path(__file__).parent / "baselines"


def machine() -> dict[str, Any]:
    """Return the facts without which a number says nothing."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cython": version("cython"),
        "compiler": _compiler(),
        "valgrind": _output("valgrind", "--version"),
        "uvloop": version("uvloop"),
        "postgres": _said_by(find_binaries, "postgres"),
        "valkey": _said_by(find_valkey, ""),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def to_json(
    results: Sequence[Result], facts: Mapping[str, Any], *, is_quick: bool
) -> bytes:
    """Return what --json and --save write."""
    return orjson.dumps(
        {
            "machine": facts,
            "quick": is_quick,
            "results": [asdict(result) for result in results],
        },
        option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SORT_KEYS,
    )


@dataclass(frozen=True, slots=True)
class Saved:
    """Results that were written, and the machine that they are of."""

    facts: dict[str, Any]
    is_quick: bool
    results: list[Result]


def read(path: Path) -> Saved:
    """Read what `to_json` wrote. Raises FileNotFoundError where nothing is."""
    content = orjson.loads(path.read_bytes())
    results = [Result(**each) for each in content["results"]]
    return Saved(content["machine"], content["quick"], results)


def save(name: str, content: bytes) -> Path:
    """Keep results under a name; return the file."""
    BASELINES.mkdir(exist_ok=True)
    path = BASELINES / f"{name}.json"
    path.write_bytes(content)
    return path


def baseline(name: str) -> Saved:
    """Return what `save` kept. Raises FileNotFoundError for an unknown name."""
    return read(BASELINES / f"{name}.json")


def comparison(name: str, results: Sequence[Result]) -> Table:
    """Set results beside saved ones. Raises FileNotFoundError for an unknown name."""
    table = Table(title=f"Beside {name} ({baseline(name).facts['commit']})")
    for column in ("case", "implementation", "figure"):
        table.add_column(column)
    for column in (name, "now", "ratio"):
        table.add_column(column, justify="right")
    for case, implementation, figure, then, now in pairs(name, results):
        ratio = f"{now / then:.2f}" if then else "-"
        table.add_row(
            *(case, implementation, figure), *(f"{then:.4g}", f"{now:.4g}", ratio)
        )
    return table


def pairs(
    name: str, results: Sequence[Result]
) -> Iterator[tuple[str, str, str, float, float]]:
    """Yield case, implementation, figure, its saved value and the one of now."""
    before = {
        (each.case, each.implementation, figure): value
        for each in baseline(name).results
        for figure, value in each.figures.items()
    }
    for result in results:
        for figure, now in result.figures.items():
            then = before.get((result.case, result.implementation, figure))
            if then is not None:
                yield result.case, result.implementation, figure, then, now


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _said_by(find: Any, name: str) -> str:
    try:
        found = find(os.environ)
    except EmbeddedFailed as error:
        return str(error)
    return _output(str(found / name) if name else str(found), "--version")


def _compiler() -> str:
    """The first line of what the compiler of extensions says it is."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return _output(*shlex.split(command), "--version").partition("\n")[0]


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
