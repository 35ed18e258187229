"""What those find who wait for a server is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.case import Result


@pytest.mark.timeout(240)
def test_who_waits_for_the_one_server_gets_it_in_turn(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("pool", "one server, and all wait for it")
    assert result.figures["answers in the order of coming, %"] == 100
    assert result.figures["from one answer to the next one's, µs"] > 0


@pytest.mark.timeout(240)
def test_who_comes_back_at_once_waits_for_all_the_others(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("pool", "four servers, and all come back")
    # 64 clients, 4 servers: 16 queries of 1 ms and more each.
    assert result.figures["median wait, ms"] > 16
    assert result.figures["longest wait, of the median, times"] > 1
