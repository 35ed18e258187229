"""pgbench: its tables, its scripts, its three protocols."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.drivers.conftest import WAYS
from tests.fixtures.engine import Organization, Proxy

CLIENTS, TRANSACTIONS = 6, 40


@pytest.fixture(scope="module")
def bench(proxy: Proxy) -> Organization:
    return proxy.create_organization(limiter=LimiterMode.OFF)


@pytest.fixture(scope="module")
def tables(bench: Organization, binaries: Path) -> None:
    """Tables made by pgbench through the proxy."""
    done = pgbench(binaries, bench.dsn("transaction"), "-i", "-s", "1", "-q")
    assert done.returncode == 0, done.stderr


def pgbench(
    binaries: Path, dsn: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [binaries / "pgbench", *arguments, dsn],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("script", ["tpcb-like", "select-only", "simple-update"])
@pytest.mark.parametrize("protocol", ["simple", "extended", "prepared"])
@pytest.mark.parametrize("way", WAYS)
def test_a_script_of_pgbench_runs(
    bench: Organization, binaries: Path, way: str, protocol: str, script: str
) -> None:
    dsn = bench.direct_dsn if way == "direct" else bench.dsn(way)
    done = pgbench(
        binaries, dsn, "-n", "-M", protocol, "-b", script,
        "-c", str(CLIENTS), "-t", str(TRANSACTIONS),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = re.search(r"actually processed: (\d+)", done.stdout)
    assert ran is not None and int(ran[1]) == CLIENTS * TRANSACTIONS
    assert "failed transactions: 0 " in done.stdout


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("way", WAYS)
def test_a_pipeline_script_runs(
    bench: Organization, binaries: Path, way: str, tmp_path: Path
) -> None:
    script = tmp_path / "pipeline.sql"
    script.write_text(
        "\\startpipeline\n"
        "SELECT abalance FROM pgbench_accounts WHERE aid = 1;\n"
        "\\syncpipeline\n"
        "SELECT abalance FROM pgbench_accounts WHERE aid = 2;\n"
        "SELECT abalance FROM pgbench_accounts WHERE aid = 3;\n"
        "\\endpipeline\n"
    )
    dsn = bench.direct_dsn if way == "direct" else bench.dsn(way)
    done = pgbench(
        binaries, dsn, "-n", "-M", "prepared", "-f", str(script), "-c", "4", "-t", "30"
    )
    assert done.returncode == 0, done.stderr
