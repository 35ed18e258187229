"""The bucket's one promise, over every window, whatever the clock does."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogelproxy._bucket import ENFORCE, OFF, WARN, TokenBucket
from tests import reference

#: What rounding may add to a level of up to some thousand tokens, in tokens.
ROUNDING = 1e-6

RATES = st.sampled_from([0.5, 1.0, 5.0, 10.0, 200.0, 1000.0])
CAPACITIES = st.sampled_from([0.0, 1.0, 2.5, 10.0, 50.0, 5000.0])
#: Steps of the clock in seconds, mostly forward.
STEPS = st.one_of(
    st.floats(0, 0.01), st.floats(0, 2), st.just(0.0), st.floats(-1, 0), st.just(3600.0)
)


def worst_excess(
    admitted: list[tuple[float, int]], rate: float, capacity: float
) -> float:
    """Tokens beyond the allowance in the worst of all windows.

    Time is what the bucket can know of it: the latest that it was ever told.
    """
    worst = -math.inf
    for first in range(len(admitted)):
        total = 0
        for time, count in admitted[first:]:
            total += count
            allowed = capacity + rate * (time - admitted[first][0])
            worst = max(worst, total - allowed)
    return worst


@settings(max_examples=500, deadline=None)
@given(RATES, CAPACITIES, st.lists(st.tuples(STEPS, st.integers(0, 12)), max_size=60))
def test_no_window_ever_admits_more_than_capacity_and_rate(
    rate: float, capacity: float, asked: list[tuple[float, int]]
) -> None:
    now = latest = 1000.0
    bucket = TokenBucket(rate, capacity, now)
    admitted = []
    for step, count in asked:
        now += step
        latest = max(latest, now)
        if bucket.take(now, count) == 0:
            admitted.append((latest, count))
    assert worst_excess(admitted, rate, capacity) <= ROUNDING
    assert bucket.admitted == sum(count for _, count in admitted)


@given(
    st.sampled_from([0.0, 0.5, 10.0]),
    st.sampled_from([0.0, 1.0, 20.0]),
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 8.0]), st.integers(0, 3))),
)
def test_tokens_are_taken_as_the_twin_takes_them(
    rate: float, capacity: float, asked: list[tuple[float, int]]
) -> None:
    ours, twin = (
        TokenBucket(rate, capacity, 0.0),
        reference.TokenBucket(rate, capacity, 0.0),
    )
    now = 0.0
    for step, count in asked:
        now += step
        assert (ours.take(now, count) == 0.0) == twin.take(now, count)
        assert ours.level == twin.level


@settings(max_examples=300, deadline=None)
@given(RATES, CAPACITIES, st.lists(st.tuples(STEPS, st.booleans()), max_size=60))
def test_tokens_given_back_are_admitted_no_more_than_once(
    rate: float, capacity: float, asked: list[tuple[float, bool]]
) -> None:
    now = latest = 0.0
    bucket = TokenBucket(rate, capacity, now)
    admitted = []
    for step, is_sent in asked:
        now += step
        latest = max(latest, now)
        if bucket.take(now, 1) == 0:
            if is_sent:
                admitted.append((latest, 1))
            else:
                bucket.refund(1)
        assert 0 <= bucket.level <= capacity
    assert worst_excess(admitted, rate, capacity) <= ROUNDING
    assert bucket.admitted == len(admitted)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(STEPS, st.integers(1, 3), st.none() | st.tuples(RATES, CAPACITIES)),
        max_size=40,
    )
)
def test_a_change_of_the_limit_grants_nothing_for_the_time_before(
    asked: list[tuple[float, int, tuple[float, float] | None]],
) -> None:
    now = latest = 0.0
    rate, capacity = 1.0, 10.0
    bucket = TokenBucket(rate, capacity, now)
    allowed = capacity  # at most, had every token been kept
    taken = 0
    for step, count, change in asked:
        now += step
        allowed += rate * max(0.0, now - latest)
        latest = max(latest, now)
        if change is not None:
            rate, capacity = change
            bucket.configure(rate, capacity, now)
            assert bucket.level <= capacity
        if bucket.take(now, count) == 0:
            taken += count
        assert taken <= allowed + ROUNDING


@given(RATES, st.floats(0, 1e6), st.integers(1, 10), st.integers(0, 10))
def test_a_wait_that_was_waited_is_enough(
    rate: float, now: float, first: int, second: int
) -> None:
    bucket = TokenBucket(rate, 10.0, now)
    assert bucket.take(now, first) == 0
    wait = bucket.take(now, second)
    assert wait >= 0
    assert bucket.take(now + wait, second) == 0 or wait == 0


def test_a_wait_is_what_is_lacking_over_the_rate() -> None:
    bucket = TokenBucket(10.0, 10.0, 0.0)
    assert bucket.take(0.0, 8) == 0.0
    assert bucket.take(0.0, 5) == pytest.approx(0.3, abs=1e-5)
    assert bucket.level == 2.0
    assert (bucket.admitted, bucket.refused, bucket.warned) == (8, 5, 0)


def test_a_wait_after_the_clock_stepped_back_covers_the_step() -> None:
    bucket = TokenBucket(10.0, 10.0, 100.0)
    assert bucket.take(100.0, 10) == 0.0
    assert bucket.take(99.0, 1) == pytest.approx(1.1, abs=1e-5)
    assert bucket.stamp == 100.0


def test_more_than_the_capacity_never_fits() -> None:
    bucket = TokenBucket(10.0, 10.0, 0.0)
    assert bucket.take(0.0, 11) == math.inf
    assert bucket.take(0.0, 10) == 0.0


def test_without_a_rate_what_is_taken_never_comes_back() -> None:
    bucket = TokenBucket(0.0, 2.0, 0.0)
    assert bucket.take(0.0, 2) == 0.0
    assert bucket.take(1e9, 1) == math.inf


def test_no_tokens_are_always_there() -> None:
    assert TokenBucket(0.0, 0.0, 0.0).take(0.0, 0) == 0.0


def test_a_bucket_that_warns_lets_pass_and_tells_by_the_sign() -> None:
    bucket = TokenBucket(10.0, 1.0, 0.0)
    bucket.mode = WARN
    assert bucket.take(0.0, 1) == 0.0
    assert bucket.take(0.0, 1) == pytest.approx(-0.1, abs=1e-5)
    assert bucket.take(0.0, 2) == -math.inf
    assert (bucket.admitted, bucket.refused, bucket.warned) == (1, 0, 3)


def test_a_bucket_that_is_off_takes_and_counts_nothing() -> None:
    bucket = TokenBucket(10.0, 1.0, 0.0)
    bucket.mode = OFF
    assert [bucket.take(0.0, 5) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert (bucket.level, bucket.admitted) == (1.0, 0)
    bucket.mode = ENFORCE
    bucket.refund(5)
    assert (bucket.level, bucket.admitted) == (1.0, 0)
    assert bucket.take(0.0, 5) == math.inf


def test_a_bucket_is_full_again_when_its_tokens_came_back() -> None:
    bucket = TokenBucket(10.0, 10.0, 0.0)
    assert bucket.is_full(0.0)
    bucket.take(0.0, 5)
    assert not bucket.is_full(0.4)
    assert bucket.is_full(0.6)


@pytest.mark.parametrize(
    ("rate", "capacity"), [(-1, 1), (1, -1), (math.nan, 1), (1, math.inf)]
)
def test_a_limit_that_can_t_be_is_refused(rate: float, capacity: float) -> None:
    with pytest.raises(ValueError, match="can't be"):
        TokenBucket(rate, capacity, 0.0)
    bucket = TokenBucket(3.0, 4.0, 0.0)
    with pytest.raises(ValueError, match="can't be"):
        bucket.configure(rate, capacity, 0.0)
    assert (bucket.rate, bucket.capacity) == (3.0, 4.0)


def test_a_bucket_may_be_watched_and_says_what_it_is() -> None:
    bucket = TokenBucket(10.0, 50.0, 0.0)
    assert repr(bucket) == "TokenBucket(rate=10, capacity=50, level=50.000)"
    watch = weakref.ref(bucket)
    del bucket
    gc.collect()
    assert watch() is None
