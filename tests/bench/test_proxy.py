"""The comparison with other proxies, in its short form."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import peers
from bench.case import Result
from bench.pairs import Promise


@pytest.mark.timeout(120)
def test_a_query_by_pgbouncer_is_timed_beside_one_by_us(
    bench: Callable[..., list[Result]],
) -> None:
    try:
        peers.find("pgbouncer")
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))
    [result] = bench("proxy", "one connection")
    [row] = result.rows
    assert row["peer"].startswith("pgbouncer 1.")
    assert row["ours"] > 10 and row["theirs"] > 10  # µs: less than no system call
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert row["is_kept"] is None  # by one pair


def test_a_promise_is_kept_up_to_its_ratio() -> None:
    assert Promise(1.0).is_kept(1.0)
    assert not Promise(1.0).is_kept(1.01)
    assert Promise(1.0, is_least=True).is_kept(1.01)
    assert not Promise(1.0, is_least=True).is_kept(0.99)
