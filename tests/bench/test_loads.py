"""Loads are the same each time, and as heavy as they say."""

from __future__ import annotations

import pytest

from bench.loads import LOADS, Place


def sent(load: str, *, rate: float, hosts: int, seconds: float) -> list[int]:
    """How many queries of a load come to each host."""
    places = [Place(rate, rate, host, hosts, seconds) for host in range(hosts)]
    return [sum(count for _, count in LOADS[load](place)) for place in places]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize(
    ("load", "times"), [("flat", 2), ("heavy", 4), ("light", 1 / 3), ("pulsed", 2)]
)
def test_a_load_is_as_many_times_the_limit_as_it_says(
    load: str, times: float, hosts: int
) -> None:
    total = sum(sent(load, rate=200.0, hosts=hosts, seconds=8.0))
    assert total == pytest.approx(200.0 * 8 * times, abs=hosts)


@pytest.mark.parametrize("load", LOADS)
def test_a_load_comes_in_order_and_in_time(load: str) -> None:
    times = [time for time, _ in LOADS[load](Place(50.0, 50.0, 1, 2, 6.0))]
    assert times == sorted(times)
    assert 0 <= times[0] and times[-1] < 6.0


@pytest.mark.parametrize("load", LOADS)
def test_a_load_is_the_same_each_time(load: str) -> None:
    place = Place(50.0, 250.0, 0, 2, 6.0)
    assert list(LOADS[load](place)) == list(LOADS[load](place))


def test_only_the_last_host_is_teased() -> None:
    first = [
        {time for time, _ in LOADS["teased"](Place(50.0, 50.0, host, 2, 8.0))}
        for host in range(2)
    ]
    assert min(first[0]) == pytest.approx(0.6, abs=0.1)
    assert 0.0 in first[1] and 4.0 in first[1]
