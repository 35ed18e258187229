"""Running the benchmark programs in their short form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from bench.case import ROOT, Result
from ogelproxy.embedded import find_binaries
from ogelproxy.embedded_valkey import find_valkey
from ogelproxy.errors import EmbeddedFailed


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., list[Result]]:
    """Run implementations of a case, which have to keep what they promise.

    ``bench("faults", "all workers are replaced")`` is a list of results.
    """

    def run(case: str, *names: str) -> list[Result]:
        try:
            find_valkey(os.environ)
            find_binaries(os.environ)
        except EmbeddedFailed as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        file = tmp_path / "results.json"
        only = [word for name in names for word in ("--only", name)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bench", case, "--quick"),
                *(*only, "--json", str(file)),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [Result(**each) for each in orjson.loads(file.read_bytes())["results"]]

    return run
