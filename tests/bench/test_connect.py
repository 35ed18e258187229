"""What a login costs and takes is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.case import Result


@pytest.mark.timeout(240)
def test_logins_are_counted_and_their_cost_is_seen(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("connect", "a new connection per query")
    assert result.figures["logins, /s"] > 1
    assert result.figures["CPU of the proxy per login, µs"] > 1


@pytest.mark.timeout(240)
def test_most_who_come_on_time_wait_less_than_the_slowest(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("connect", "200 logins a second")
    waits = [result.figures[f"P{percent}, ms"] for percent in (50, 95, 99)]
    assert 0 < waits[0] <= waits[1] <= waits[2]
