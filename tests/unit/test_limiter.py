"""The limiter: one bucket per organisation, kept as long as it must be."""

from __future__ import annotations

import math
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from ogelproxy.config import Limits
from ogelproxy.limiter import PROMPT_INTERVAL, PROMPT_REFUSALS, Limiter, TokenBucket
from ogelproxy.tenants.model import LimiterMode, Tenant, Tier

FREE = Tier("free", 5, 10.0, 1, False, 0, 5, 10, None, None, 1)
PRO = Tier("pro", 50, 200.0, 100, True, 50, 200, 500, 0.12, 0.04, None)


def tenant(handle: str = "org_a", **changes: object) -> Tenant:
    made = Tenant(UUID(int=1), handle, "A", FREE, False, 1, salt=b"salt")
    return replace(made, **changes)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(Limits(), clock)


def test_all_connections_of_an_organisation_share_a_bucket(limiter: Limiter) -> None:
    assert limiter.bucket(tenant()) is limiter.bucket(tenant())
    assert limiter.bucket(tenant("org_b")) is not limiter.bucket(tenant())


def test_a_bucket_holds_a_second_or_with_bursts_five(limiter: Limiter) -> None:
    free = limiter.bucket(tenant())
    pro = limiter.bucket(tenant("org_b", tier=PRO))
    assert (free.rate, free.capacity) == (10.0, 10.0)
    assert (pro.rate, pro.capacity) == (200.0, 1000.0)


def test_a_change_reaches_the_live_bucket_at_once(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    limiter.update(
        tenant(tier=PRO, version=2, limiter_mode=LimiterMode.WARN, max_wait=0.5)
    )
    assert (bucket.rate, bucket.capacity, bucket.level) == (200.0, 1000.0, 10.0)
    assert bucket.max_wait == 0.5
    assert bucket.take(1000.0, 11) < 0
    limiter.update(tenant(version=3, limiter_mode=LimiterMode.OFF))
    assert bucket.take(1000.0, 11) == 0
    assert (bucket.rate, bucket.level) == (10.0, 10.0)


def test_a_login_with_an_old_record_does_not_undo_a_change(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    limiter.update(tenant(tier=PRO, version=2))
    assert limiter.bucket(tenant(version=1)) is bucket
    assert bucket.rate == 200.0


def test_a_login_with_a_newer_record_brings_the_change(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    limiter.bucket(tenant(tier=PRO, version=2))
    assert bucket.rate == 200.0


def test_an_update_of_who_has_no_bucket_makes_none(limiter: Limiter) -> None:
    limiter.update(tenant())
    limiter.forget("org_a")
    assert len(limiter) == 0


def test_a_bucket_that_is_held_is_never_forgotten(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    limiter.forget("org_a")
    assert limiter.bucket(tenant()) is bucket


def test_coming_back_does_not_refill(limiter: Limiter, clock: Clock) -> None:
    limiter.bucket(tenant()).take(clock.now, 10)
    limiter.forget("org_a")
    assert limiter.bucket(tenant()).take(clock.now, 1) > 0
    clock.now += 1.0
    limiter.forget("org_a")
    assert len(limiter) == 0


def test_organisations_that_come_and_go_leave_nothing_behind(
    limiter: Limiter, clock: Clock
) -> None:
    held = [limiter.bucket(tenant(f"org_held{number}")) for number in range(5)]
    for number in range(2000):
        limiter.bucket(tenant(f"org_{number}")).take(clock.now, 10)
        clock.now += 0.01
    # Those of the last second are not full yet; the sweep lags a little.
    assert len(limiter) < 5 + 2 * 100 + 10
    for bucket, number in zip(held, range(5), strict=True):
        assert limiter.bucket(tenant(f"org_held{number}")) is bucket


def test_a_refusal_tells_tier_limit_and_when_to_come_back(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    error = limiter.refusal(bucket, tenant(), 0.1101)
    assert (error.sqlstate, error.severity) == ("53400", "ERROR")
    assert error.detail == "tier=free limit=10/s"
    assert error.hint == "retry after 0.12 s"
    assert "org_a" in str(error)
    assert "org_a" not in error.client_text + error.detail + error.hint


def test_a_warning_is_worded_by_the_same_wait_with_its_sign(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    assert limiter.refusal(bucket, tenant(), -2.0).hint == "retry after 2.00 s"


def test_a_message_that_never_fits_is_told_to_be_split(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant())
    error = limiter.refusal(bucket, tenant(), math.inf)
    assert error.hint == "send at most 10 statements per message"


def test_a_refusal_without_a_record_names_the_limit(limiter: Limiter) -> None:
    bucket = limiter.bucket(tenant(tier=replace(FREE, max_queries_per_second=2.5e6)))
    error = limiter.refusal(bucket, None, 1.0)
    assert error.detail == "limit=2500000/s"


def test_repeated_refusals_speak_of_upgrading(limiter: Limiter, clock: Clock) -> None:
    bucket = limiter.bucket(tenant())

    def hints(count: int) -> list[bool]:
        made = [limiter.refusal(bucket, tenant(), 0.1) for _ in range(count)]
        return ["upgrade" in error.hint for error in made]

    assert hints(PROMPT_REFUSALS) == [False] * (PROMPT_REFUSALS - 1) + [True]
    clock.now += PROMPT_INTERVAL + 1
    assert hints(1) == [False]


class Visits(RuleBasedStateMachine):
    """Connections come, spend, go and are forgotten; the limit must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.limiter = Limiter(Limits(), self.clock)
        self.held: dict[str, list[TokenBucket]] = {"org_a": [], "org_b": []}
        self.spent: dict[str, list[tuple[float, int]]] = {"org_a": [], "org_b": []}

    handles = Bundle("handles")

    @rule(target=handles, handle=st.sampled_from(["org_a", "org_b"]))
    def name(self, handle: str) -> str:
        return handle

    @rule(handle=handles)
    def come(self, handle: str) -> None:
        bucket = self.limiter.bucket(tenant(handle))
        assert all(other is bucket for other in self.held[handle])
        self.held[handle].append(bucket)

    @rule(handle=handles)
    def go(self, handle: str) -> None:
        if self.held[handle]:
            self.held[handle].pop()

    @rule(handle=handles, count=st.integers(1, 10))
    def spend(self, handle: str, count: int) -> None:
        for bucket in self.held[handle][:1]:
            if bucket.take(self.clock.now, count) == 0:
                self.spent[handle].append((self.clock.now, count))

    @rule(handle=handles)
    def forget(self, handle: str) -> None:
        self.limiter.forget(handle)

    @rule(number=st.integers(0, 3))
    def pass_by(self, number: int) -> None:
        self.limiter.bucket(tenant(f"org_other{number}"))

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def no_window_is_over(self) -> None:
        for spent in self.spent.values():
            for first in range(len(spent)):
                window = spent[-1][0] - spent[first][0]
                total = sum(count for _, count in spent[first:])
                assert total <= 10 + 10 * window + 1e-6


Visits.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestVisits = Visits.TestCase
