"""The programs that measure a whole stack, in their short form."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import faults
from bench.case import Result

ROLLED = "all workers are replaced"


@pytest.mark.timeout(240)
def test_workers_are_replaced_under_load_with_limits_slots_and_usage_exact(
    bench: Callable[..., list[Result]],
) -> None:
    assert ROLLED in faults.FAULTS
    [result] = bench("faults", ROLLED)
    answered = result.figures["queries answered"]
    assert 0 < answered <= result.figures["queries counted"]


@pytest.mark.timeout(240)
def test_a_change_of_tier_is_seen_through_all_workers_within_a_second(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("fleet", "a change of tier")
    assert 0 < result.figures["worst until seen by all, ms"] <= 1000
