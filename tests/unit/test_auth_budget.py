"""FailureBudget: who has to wait, how long, and who never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.auth.budget import FailureBudget, network
from ogelproxy.errors import LoginThrottled


def fail(budget: FailureBudget, source: str, now: float, count: int = 1) -> None:
    for _ in range(count):
        budget.check("org_a", source, now)
        budget.record("org_a", source, now)


def test_a_source_waits_once_its_failures_are_used_up() -> None:
    budget = FailureBudget(10, 60.0)
    fail(budget, "192.0.2.1", 100.0, 10)
    with pytest.raises(LoginThrottled) as caught:
        budget.check("org_a", "192.0.2.1", 100.0)
    assert caught.value.hint == "retry after 6.0 s"
    assert "192.0.2.1" not in caught.value.client_text


def test_a_failure_is_forgiven_after_its_share_of_the_interval() -> None:
    budget = FailureBudget(10, 60.0)
    fail(budget, "192.0.2.1", 100.0, 10)
    fail(budget, "192.0.2.1", 106.0)
    with pytest.raises(LoginThrottled):
        budget.check("org_a", "192.0.2.1", 111.9)
    fail(budget, "192.0.2.1", 200.0, 10)


def test_failures_under_way_at_the_limit_do_not_lengthen_the_wait() -> None:
    budget = FailureBudget(2, 10.0)
    for _ in range(1000):
        budget.record("org_a", "192.0.2.1", 0.0)
    budget.check("org_a", "192.0.2.1", 5.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 9)), max_size=60))
def test_no_window_holds_more_than_twice_the_budget(
    steps: list[tuple[float, int]],
) -> None:
    budget = FailureBudget(3, 10.0)
    now, passed = 0.0, []
    for pause, attempts in steps:
        now += pause
        for _ in range(attempts):
            try:
                fail(budget, "192.0.2.1", now)
            except LoginThrottled:
                continue
            passed.append(now)
    for start in passed:
        assert sum(start <= at < start + 10.0 for at in passed) <= 6


def test_an_outsider_locks_out_neither_other_networks_nor_other_organisations() -> None:
    budget = FailureBudget(1, 60.0)
    fail(budget, "192.0.2.1", 0.0)
    for source in ("192.0.3.1", "2001:db8::1", ""):
        budget.check("org_a", source, 0.0)
    budget.check("org_b", "192.0.2.1", 0.0)
    with pytest.raises(LoginThrottled):
        budget.check("org_a", "192.0.2.77", 0.0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unix"),
        ("not an address", "unix"),
    ],
)
def test_a_source_is_its_network(source: str, expected: str) -> None:
    assert network(source) == expected


def test_memory_is_bounded_and_the_oldest_failure_is_forgotten_first() -> None:
    budget = FailureBudget(1, 60.0, max_entries=3)
    for number in (1, 2, 3):
        budget.record("org_a", f"192.0.{number}.1", 0.0)
    budget.record("org_a", "192.0.1.1", 1.0)
    budget.record("org_a", "192.0.4.1", 2.0)
    assert len(budget) == 3
    budget.check("org_a", "192.0.2.1", 2.0)
    with pytest.raises(LoginThrottled):
        budget.check("org_a", "192.0.1.1", 2.0)


def test_looking_costs_no_memory() -> None:
    budget = FailureBudget(1, 60.0)
    budget.check("org_a", "192.0.2.1", 0.0)
    assert len(budget) == 0
