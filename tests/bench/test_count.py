"""Instructions per query are no more than those that are kept, and more is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import count, report
from bench.__main__ import CASES
from bench.case import ROOT
from bench.micro import Micro

BASELINE = "instructions"
#: Valgrind is slow, and on a busy machine slower.
pytestmark = pytest.mark.timeout(300)

#: Percent. From run to run and from build to build counts differ by up to 1.
MOST = 5
#: What a second look at the bucket for each token costs is far more than that.
SPENT = "            self.spend(now, count)\n"
SLOWER = SPENT + "            self.spend(now, 0)\n"


@pytest.fixture(autouse=True)
def comparable() -> None:
    """Skip where counts can't be had, or not be compared with those that are kept."""
    if not count.is_possible():
        pytest.skip("valgrind is missing: apt-get install valgrind")
    if reason := count.unlike(BASELINE):
        pytest.skip(f"counts are kept of another machine: {reason}")


def counted(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Count with the sources in a directory, beside the baseline that is there."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "bench", *arguments, "--count"),
            *("--compare", BASELINE, "--fail-above", str(MOST)),
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_query_takes_more_instructions_than_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "counted.json"
    done = counted(ROOT, "--json", str(file))
    # Where that is as it should be: python -m bench --count --save instructions
    assert done.returncode == 0, done.stderr
    kept, now = (
        {(each.case, figure) for each in saved.results for figure in each.figures}
        for saved in (report.baseline(BASELINE), report.read(file))
    )
    assert kept == now, "a loop is new or gone"
    loops = [case for case in CASES.values() if isinstance(case, Micro)]
    assert len(now) == sum(len(case.names) for case in loops)


def test_what_takes_longer_fails(tmp_path: Path) -> None:
    for name in ("bench", "ogelproxy", "tests/fixtures"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "tests/reference.py", tmp_path / "tests")
    source = tmp_path / "ogelproxy/_bucket.pyx"
    text = source.read_text()
    assert text.count(SPENT) == 1
    source.write_text(text.replace(SPENT, SLOWER))
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-3", "-q"]
    subprocess.run([*command, str(source)], check=True)
    done = counted(tmp_path, "bucket")
    assert done.returncode == 1, done.stderr
    failures = [line for line in done.stderr.splitlines() if "not kept:" in line]
    assert [line.partition(", instructions")[0] for line in failures] == [
        "not kept: bucket, taken",
        "not kept: bucket, taken of a lease",
    ]
