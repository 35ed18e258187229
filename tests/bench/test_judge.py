"""The judges of limits against slow ones that look at every window."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judge import certain_excess, worst_excess

#: Multiples of 1/64 s, so that sums are exact and many times are equal.
TIMES = st.integers(0, 640).map(lambda step: step / 64)
RATES = st.sampled_from([0.0, 0.5, 4.0, 64.0, 1024.0])
CAPACITIES = st.sampled_from([0.0, 1.0, 5.5, 64.0])


def slow_excess(
    spans: list[tuple[float, float]], rate: float, capacity: float
) -> float:
    """Look at every window that begins with a span and ends with one."""
    worst = -math.inf
    for begin, _ in spans:
        for _, end in spans:
            within = sum(begin <= first and last <= end for first, last in spans)
            if within:
                worst = max(worst, within - capacity - rate * (end - begin))
    return worst


@settings(max_examples=300, deadline=None)
@given(st.lists(TIMES, max_size=40), RATES, CAPACITIES)
def test_the_judge_of_times_finds_what_looking_at_every_window_finds(
    times: list[float], rate: float, capacity: float
) -> None:
    slow = slow_excess([(time, time) for time in times], rate, capacity)
    assert worst_excess(times, rate, capacity) == slow


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(TIMES, TIMES).map(lambda two: (min(two), max(two)))),
    RATES,
    CAPACITIES,
)
def test_the_judge_of_spans_finds_what_looking_at_every_window_finds(
    spans: list[tuple[float, float]], rate: float, capacity: float
) -> None:
    assert certain_excess(spans, rate, capacity) == slow_excess(spans, rate, capacity)


@given(st.lists(TIMES), RATES, CAPACITIES)
def test_both_judges_agree_on_spans_of_no_length(
    times: list[float], rate: float, capacity: float
) -> None:
    spans = [(time, time) for time in times]
    assert certain_excess(spans, rate, capacity) == worst_excess(times, rate, capacity)


def test_a_burst_beyond_the_capacity_is_over_by_the_rest() -> None:
    assert worst_excess([3.0] * 12, rate=100.0, capacity=10.0) == 2.0


def test_a_wide_span_accuses_nobody_of_a_narrow_window() -> None:
    late = [(0.0, 10.0)] * 5
    assert certain_excess(late, rate=1.0, capacity=1.0) < 0
    assert worst_excess([end for _, end in late], rate=1.0, capacity=1.0) == 4.0


def test_nothing_admitted_is_never_over() -> None:
    assert worst_excess([], 1.0, 1.0) == certain_excess([], 1.0, 1.0) == -math.inf


def test_a_full_second_at_the_rate_after_a_full_bucket_is_just_allowed() -> None:
    burst = [0.0] * 10
    steady = [number / 10 for number in range(1, 11)]
    assert worst_excess(burst + steady, 10.0, 10.0) == pytest.approx(0.0)
