"""What a second worker brings is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.case import Result


@pytest.mark.timeout(240)
def test_two_workers_share_the_clients_and_can_do_more_than_one(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("scale")
    assert 50 <= result.figures["clients of the worker that has most, %"] < 75
    name = "transactions per CPU second of the busiest worker, times"
    assert result.figures[name] > 1
