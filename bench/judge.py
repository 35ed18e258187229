"""Judges of a limit: by how much was it exceeded, over the worst of all windows?

A limit is a rate in tokens per second and a capacity in tokens: a window of d
seconds may admit ``capacity + rate * d``. Both judges answer with the most that any
window admitted beyond that, in tokens: above 0 the limit was broken, below 0 it is
what the worst window left unused. Windows are closed: one of no length that holds a
burst is a window.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

#: Seconds from earliest to latest, of one admission.
Span = tuple[float, float]


def worst_excess(times: Iterable[float], rate: float, capacity: float) -> float:
    """Judge admissions of one token each, whose times are known; O(n) when sorted.

    -inf when there are none.
    """
    # With S(t) admitted up to t, a window from s to t is over by
    # (S(t) - rate * t) - (S(before s) - rate * s) - capacity.
    worst = -math.inf
    lowest = math.inf
    for before, time in enumerate(sorted(times)):
        lowest = min(lowest, before - rate * time)
        worst = max(worst, before + 1 - rate * time - lowest)
    return worst - capacity


def certain_excess(spans: Sequence[Span], rate: float, capacity: float) -> float:
    """Judge admissions of which only is known that they were within a span.

    A window counts those whose span lies in it wholly, so what is reported is the
    least that can have happened: no answer that was long under way can make an
    excess that was none. O(n log n); -inf when there are none.
    """
    starts = sorted({start for start, _ in spans})
    windows = _Windows(len(starts))
    worst = -math.inf
    for start, end in sorted(spans, key=lambda span: span[1]):
        place = bisect_left(starts, start)
        # A window that begins at or before `start` has one more. One that begins
        # where no span has ended yet is never worse than the next one.
        windows.begin(place, rate * start)
        windows.add(place + 1)
        worst = max(worst, windows.highest - rate * end)
    return worst - capacity


class _Windows:
    """A number per possible begin of a window: adding to a prefix, and the maximum.

    A segment tree. A node is the highest of those below it that have begun, without
    what was added to the nodes above it.
    """

    def __init__(self, count: int) -> None:
        self._size = 1 << max(count - 1, 0).bit_length()
        self._highest = [-math.inf] * (2 * self._size)
        self._added = [0] * (2 * self._size)  # to a node as a whole

    @property
    def highest(self) -> float:
        return self._highest[1]

    def begin(self, place: int, value: float) -> None:
        """Let a window take part, with what was added to it since the start."""
        node = place + self._size
        if self._highest[node] == -math.inf:
            self._highest[node] = value + self._added[node]
            self._pull_above(node)

    def add(self, count: int) -> None:
        """Add one to the first `count` numbers."""
        if count == self._size:
            self._raise(1)
            return
        # The nodes that make up the prefix hang to the left of the way to `count`.
        node = count + self._size
        while node > 1:
            if node & 1:
                self._raise(node - 1)
            node //= 2
            self._pull(node)

    def _raise(self, node: int) -> None:
        self._highest[node] += 1
        self._added[node] += 1

    def _pull_above(self, node: int) -> None:
        while node > 1:
            node //= 2
            self._pull(node)

    def _pull(self, node: int) -> None:
        below = max(self._highest[2 * node], self._highest[2 * node + 1])
        self._highest[node] = below + self._added[node]
