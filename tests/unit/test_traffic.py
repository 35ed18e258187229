"""The book of traffic: sums that never fall, and rates."""

from __future__ import annotations

from uuid import UUID

from ogelproxy.traffic import FIELDS, PERIOD, TrafficBook, Work, averages

ONE, OTHER = UUID(int=1), UUID(int=2)


def test_clients_of_one_target_and_tier_count_into_one() -> None:
    book = TrafficBook(0.0)
    traffic = book.of(ONE, "free", "postgres")
    assert book.of(ONE, "free", "postgres") is traffic
    assert book.of(ONE, "pro", "postgres") is not traffic
    assert book.of(OTHER, "free", "postgres") is not traffic


def test_sums_by_tier_outlive_the_targets() -> None:
    book = TrafficBook(0.0)
    book.of(ONE, "free", "postgres").logins += 2
    book.of(OTHER, "free", "postgres").logins += 3
    book.of(OTHER, "pro", "postgres").logins += 4
    for live in ([ONE, OTHER], [ONE], []):
        book.sweep(PERIOD * (3 - len(live)), live)
        assert {each.tier: each.logins for each in book.sums()} == {"free": 5, "pro": 4}
        assert set(book.work()) == set(live)
    assert book.past().logins == 9


def test_a_target_that_comes_back_begins_anew() -> None:
    book = TrafficBook(0.0)
    book.of(ONE, "free", "postgres").logins += 1
    book.sweep(PERIOD, [])
    book.of(ONE, "free", "postgres").logins += 1
    assert book.work()[ONE].logins == 1
    assert [each.logins for each in book.sums()] == [2]


def shown(rates: tuple[float, ...]) -> Work:
    """The averages by their names."""
    return Work(**dict(zip(FIELDS, averages(rates), strict=True)))


def test_rates_are_measured_over_one_to_two_periods() -> None:
    book = TrafficBook(0.0)
    traffic = book.of(ONE, "free", "postgres")
    traffic.logins = 600
    assert shown(book.rates(PERIOD)[ONE]).logins == 600 / PERIOD
    book.sweep(PERIOD, [ONE])
    assert shown(book.rates(PERIOD + 1)[ONE]).logins == round(600 / (PERIOD + 1))
    book.sweep(2 * PERIOD, [ONE])
    assert shown(book.rates(2 * PERIOD + 30)[ONE]).logins == 0
    traffic.logins += 180
    assert shown(book.rates(2 * PERIOD + 30)[ONE]).logins == 180 / 90


def test_times_are_averages_per_occurrence() -> None:
    before = Work(transactions=1, queries=1, transaction_us=100, query_us=50)
    now = Work(
        loans=2,
        transactions=3,
        queries=11,
        transaction_us=1100,
        query_us=550,
        wait_us=80,
    )
    rate = shown(now.rates(before, 2.0))
    assert (rate.transaction_us, rate.query_us, rate.wait_us) == (500, 50, 40)
    assert (rate.loans, rate.transactions, rate.queries) == (1, 1, 5)


def test_averages_of_a_sum_weigh_times_by_their_occurrences() -> None:
    quick = Work(queries=90, query_us=90 * 100).rates(Work(), 60.0)
    slow = Work(queries=10, query_us=10 * 2000).rates(Work(), 60.0)
    both = tuple(one + other for one, other in zip(quick, slow, strict=True))
    assert shown(both).query_us == 290
    assert shown(both).queries == 2
