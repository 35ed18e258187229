"""The comparison with other proxies, in its short form."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from bench import peers, proxy
from bench.case import Result
from bench.pairs import Promise
from bench.pgbench import Outcome


@pytest.mark.timeout(120)
def test_pgbouncer_s_cpu_time_of_a_transaction_is_beside_ours(
    bench: Callable[..., list[Result]],
) -> None:
    try:
        peers.find("pgbouncer")
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))
    [result] = bench("proxy", "cost")
    [row] = result.rows
    assert row["peer"].startswith("pgbouncer 1.")
    # Microseconds: no proxy does with less than some system calls.
    assert 1 < row["ours"] < 1000 and 1 < row["theirs"] < 1000
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert row["is_kept"] is None  # by one pair


def test_a_peer_that_does_not_start_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(peers.variable("pgbouncer"), "false")
    result = proxy.CASE.run("cost", is_quick=True)
    assert [row["left out"] for row in result.rows] == ["pgbouncer"]
    [failure] = result.failures
    assert "pgbouncer ended while starting" in failure


def test_a_percentile_is_the_least_that_so_many_do_not_exceed() -> None:
    outcome = Outcome(100, 1.0, 0.0, 0, array("d", range(1, 101)))
    assert [outcome.percentile(percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert outcome.percentile(99.5) == 100
    assert outcome.typical() == pytest.approx(45.5)  # of 1 to 90


def test_a_promise_is_kept_up_to_its_ratio() -> None:
    assert Promise(1.0).is_kept(1.0)
    assert not Promise(1.0).is_kept(1.01)
    assert Promise(1.0, is_least=True).is_kept(1.01)
    assert not Promise(1.0, is_least=True).is_kept(0.99)
