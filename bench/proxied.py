"""A trial through the whole proxy: clients over the wire, judged by Postgres's clock.

A query was admitted after its client sent it and before Postgres ran it. Both are
times of one machine's clock, so the judge of spans needs no tolerance: what it finds
to be over was over.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.crowd import Crowd, Group
from bench.stack import Stack

#: By tier: queries per second, capacity, and clients that send more than twice that.
TIERS = {
    "free": (10.0, 10.0, 4),
    "starter": (50.0, 250.0, 6),
    "pro": (200.0, 1000.0, 12),
}
#: Tokens; Postgres's clock has microseconds.
ROUNDING = 1e-3
#: Seconds between the queries of a client, and for which each waits for a token.
PAUSE, MAX_WAIT = 0.01, 0.1


@dataclass(frozen=True, slots=True)
class Passage:
    """What came of one organisation."""

    rate: float
    capacity: float
    excess: float  # tokens that were certainly over, in the worst window
    admitted: int
    allowed: float  # tokens in the time that there was
    errors: int  # beside the rate limit


def run(workers: int, seconds: float) -> list[Passage]:
    """Let clients of each tier send for `seconds`, in the main thread."""
    with tempfile.TemporaryDirectory() as directory:
        # Whom root's servers run as may walk through it.
        Path(directory).chmod(0o711)
        return asyncio.run(_run(Path(directory), workers, seconds))


async def _run(directory: Path, workers: int, seconds: float) -> list[Passage]:
    async with Stack(directory, workers=workers) as stack:
        made = await stack.make(list(TIERS), max_wait=MAX_WAIT)
        began_at = time.monotonic()
        crowd = Crowd(stack, [Group(each, TIERS[each.tier][2], PAUSE) for each in made])
        await crowd.start()
        await asyncio.sleep(seconds)
        await crowd.leave()
        elapsed = time.monotonic() - began_at
    passages = []
    for each in made:
        rate, capacity, _ = TIERS[each.tier]
        ledger = crowd.ledgers[each.handle]
        passages.append(
            Passage(
                rate=rate,
                capacity=capacity,
                excess=crowd.excess(each.handle, rate, capacity),
                admitted=len(ledger.answered),
                allowed=capacity + rate * elapsed,
                errors=len(ledger.errors),
            )
        )
    return passages
