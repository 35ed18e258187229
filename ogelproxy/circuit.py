"""Circuit: when the next server of a target may be opened.

After a failed attempt the next one waits, each time about twice as long; after
a few in a row the circuit is open: whoever needs a new server is refused at
once, and when the pause is over one attempt, the probe, decides for all. Rules
only: it opens nothing and reads no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from ogelproxy.errors import CircuitOpen, TargetUnreachable

#: Attempts that have to fail in a row before clients are refused at once. A
#: restart of a small Postgres is over before the third.
MAX_FAILURES = 3

#: Seconds to wait after a failure, doubling, before the jitter.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0

State = Literal["closed", "open", "half-open"]


class Circuit:
    """Failed attempts at one target, and what they mean for the next.

    `jitter` returns a number from 0 to 1; it spreads the attempts of many
    pools, and of many proxies, that lost one target at the same moment.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._failures = 0  # attempts in a row that failed
        self._failed_at = 0.0  # when the last of them ended
        self._pause = 0.0  # seconds that the last failure cost, before the jitter
        self._retry_at = 0.0  # when the next attempt may be made
        self._is_probing = False  # an attempt of the open circuit is under way
        self._cause = TargetUnreachable()  # why the last one failed

    @property
    def state(self) -> State:
        if self._failures < MAX_FAILURES:
            return "closed"
        return "half-open" if self._is_probing else "open"

    def check(self, now: float) -> None:
        """Raise CircuitOpen if an attempt would be refused now."""
        if self._failures < MAX_FAILURES:
            return
        wait = self._retry_at - now
        if self._is_probing or wait > 0:
            raise CircuitOpen(max(wait, FIRST_PAUSE), self._cause)

    def begin(self, now: float) -> float:
        """Begin an attempt; return the seconds that it has to wait first.

        Each one ends with `succeed`, `fail` or `forget`. Raises CircuitOpen.
        """
        self.check(now)
        if self._failures < MAX_FAILURES:
            return max(self._retry_at - now, 0.0)
        self._is_probing = True
        return 0.0

    def succeed(self) -> bool:
        """End an attempt: the target is there. Return whether it was open."""
        was_open = self._failures >= MAX_FAILURES
        self._failures = 0
        self._pause = self._retry_at = 0.0
        self._is_probing = False
        return was_open

    def fail(self, cause: TargetUnreachable, began: float, now: float) -> bool:
        """End an attempt of `began` that failed. Return whether that opened it.

        Attempts made side by side count as one.
        """
        self._is_probing = False
        if began < self._failed_at:
            return False
        self._failures += 1
        self._cause = cause
        self._failed_at = now
        self._pause = min(self._pause * 2 or FIRST_PAUSE, LONGEST_PAUSE)
        self._retry_at = now + self._pause * (0.5 + self._jitter() / 2)
        return self._failures == MAX_FAILURES

    def forget(self) -> None:
        """End an attempt that was given up, and says nothing of the target."""
        self._is_probing = False
