"""Finding: what one look at one thing came to, and what to do about it.

Also the one measure that several servers are taken by, their clock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

#: Seconds between two clocks from which times of day in logs and bills, and the
#: expiry of tokens, are no longer to be relied on.
MAX_CLOCK_DIFFERENCE = 1.0
CLOCK_TRIES = 3

#: A clock: Unix time in seconds.
Now = Callable[[], float]


class Verdict(StrEnum):
    """How bad it is. With a failure the proxy does not do what it promises."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for a person; `advice` says what to do unless all is well."""

    subject: str
    verdict: Verdict
    text: str
    advice: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding(subject, Verdict.OK, text)


def warn(subject: str, text: str, advice: str) -> Finding:
    return Finding(subject, Verdict.WARN, text, advice)


def fail(subject: str, text: str, advice: str) -> Finding:
    return Finding(subject, Verdict.FAIL, text, advice)


async def compare_clock(
    subject: str, ask: Callable[[], Awaitable[float]], now: Now
) -> Finding:
    """Compare a server's clock, which `ask` returns as Unix time, with ours.

    The answer was made some time between question and arrival: what half of the
    quickest round trip could explain is no difference.
    """
    measured = []
    for _ in range(CLOCK_TRIES):
        asked_at = now()
        there = await ask()
        round_trip = max(now() - asked_at, 0.0)
        measured.append((round_trip, there - (asked_at + round_trip / 2)))
    round_trip, difference = min(measured)
    certain = max(abs(difference) - round_trip / 2, 0.0)
    if certain <= MAX_CLOCK_DIFFERENCE:
        return ok(subject, f"within {max(certain, 0.001):.3f} s of this machine's")
    direction = "ahead of" if difference > 0 else "behind"
    return warn(
        subject,
        f"{certain:,.1f} s {direction} this machine's",
        "let chrony, or another NTP client that slews, run on both machines",
    )
