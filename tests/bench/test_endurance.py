"""A day's work is done, counted, and watched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import endurance
from bench.case import Result


@pytest.mark.timeout(240)
def test_a_short_day_s_work_is_billed_to_the_last_query(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("endurance")  # fails where it was not
    quick = endurance.QUICK
    connects = quick.connects + quick.organizations
    assert result.figures["connects"] == connects
    assert result.figures["queries"] == quick.queries + connects
    assert result.figures["memory before, bytes"] > 1e6
