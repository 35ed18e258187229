"""How many queries each organisation may have in flight; waiting is seen in
tests/integration/test_in_flight.py."""

from __future__ import annotations

import gc
from dataclasses import replace
from uuid import UUID

import pytest

from ogelproxy.flights import FlightBook, refusal
from ogelproxy.tenants.model import LimiterMode, Tenant, Tier

TIER = Tier("t", 10, 10.0, 1.0, True, 0.0, 1.0, 1.0, None, None, 1, max_in_flight=3)
TENANT = Tenant(UUID(int=1), "org_a", "A", TIER, False, 1, salt=b"salt")


def with_limit(limit: int | None, version: int) -> Tenant:
    return replace(TENANT, tier=replace(TIER, max_in_flight=limit), version=version)


@pytest.mark.parametrize(("workers", "most"), [(1, 3), (2, 2), (3, 1), (4, 1), (64, 1)])
def test_each_worker_has_its_part_of_the_limit(workers: int, most: int) -> None:
    assert FlightBook(workers).of(TENANT).most == most


@pytest.mark.parametrize("mode", [LimiterMode.WARN, LimiterMode.OFF])
def test_nothing_is_limited_where_the_limiter_does_not_enforce(
    mode: LimiterMode,
) -> None:
    assert FlightBook(1).of(replace(TENANT, limiter_mode=mode)).most == 0


def test_a_tier_may_be_without_limit() -> None:
    assert FlightBook(1).of(with_limit(None, 1)).most == 0


def test_an_organisation_has_one_count_while_anybody_holds_it() -> None:
    book = FlightBook(1)
    flights = book.of(TENANT)
    assert book.of(TENANT) is flights
    before = id(flights)
    other = book.of(replace(TENANT, handle="org_b"))
    assert other is not flights
    del flights
    gc.collect()
    book.update(with_limit(9, 2))  # nobody's: nothing is made
    assert book.of(TENANT).most == 3
    assert before != id(other)


def test_a_change_reaches_the_count_at_once_and_an_old_login_does_not() -> None:
    book = FlightBook(1)
    flights = book.of(TENANT)
    book.update(with_limit(5, 7))
    assert flights.most == 5
    assert book.of(TENANT).most == 5  # a login that began before the change


def test_the_refusal_names_tier_limit_and_time() -> None:
    error = refusal(TENANT, 1.25)
    assert (error.sqlstate, error.code) == ("53400", "too_many_in_flight")
    assert error.client_text == "too many queries in flight, waited 1.2 s"
    assert error.detail == "tier=t limit=3"
    assert refusal(None, 1.0).detail == ""
