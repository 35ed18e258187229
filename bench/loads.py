"""Loads: when queries of one organisation reach one of several hosts.

A load is a rule that gives the same arrivals each time: seconds since the begin
and how many come then. Each is for one host of `hosts`; the hosts' loads together
are what the organisation sends. Rates are multiples of the limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: Seconds between looks at the clock; what comes in between comes at once.
TICK = 0.0025

Arrivals = Iterator[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Place:
    """One host's part of an organisation's load."""

    rate: float  # of the limit, tokens per second
    capacity: float  # of the limit, tokens
    host: int  # from 0
    hosts: int
    seconds: float


def _stream(place: Place, share: Callable[[float], float], seed: int) -> Arrivals:
    """Yield arrivals at `share` times the limit, as a function of time."""
    owed = random.Random(f"{seed}/{place.host}").random()
    for tick in range(int(place.seconds / TICK)):
        time = tick * TICK
        owed += share(time) * place.rate / place.hosts * TICK
        if owed >= 1:
            yield time, int(owed)
            owed %= 1


def flat(place: Place) -> Arrivals:
    """Twice the limit, evenly."""
    return _stream(place, lambda time: 2.0, 1)


def heavy(place: Place) -> Arrivals:
    """Four times the limit, evenly."""
    return _stream(place, lambda time: 4.0, 2)


def light(place: Place) -> Arrivals:
    """A third of the limit, evenly."""
    return _stream(place, lambda time: 1 / 3, 3)


def pulsed(place: Place) -> Arrivals:
    """Four times the limit for a second, and nothing for the next."""
    return _stream(place, lambda time: 4.0 if time % 2 < 1 else 0.0, 4)


def spiky(place: Place) -> Arrivals:
    """Half the limit, and bursts of twice the capacity at one host or at all."""
    dice = random.Random(5)
    steady = _stream(place, lambda time: 0.5, 5)
    following = next(steady, None)
    time = 0.3
    while time < place.seconds:
        while following is not None and following[0] < time:
            yield following
            following = next(steady, None)
        aimed = dice.randrange(-1, place.hosts)
        if aimed in (-1, place.host):
            hit = place.hosts if aimed == -1 else 1
            yield time, max(1, round(2 * place.capacity / hit))
        time += dice.uniform(0.4, 1.6)


def teased(place: Place) -> Arrivals:
    """Some queries at the last host, quiet, then eight times the limit, every 4 s.

    They are more than it mints by itself. So it holds a part of the bucket then, which
    a wrong limiter grants again to whoever comes next.
    """
    is_last = place.host == place.hosts - 1
    some = (2 + 0.02 * place.capacity) * place.hosts / (place.rate * TICK)

    def share(time: float) -> float:
        phase = time % 4.0
        if phase < TICK:
            return some if is_last else 0.0
        return 8.0 if 0.6 <= phase < 1.0 else 0.0

    return _stream(place, share, 6)


LOADS: dict[str, Callable[[Place], Arrivals]] = {
    load.__name__: load for load in (flat, heavy, light, pulsed, spiky, teased)
}
