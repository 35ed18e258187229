"""The case `bucket`: what a token costs, alone and with leases.

A lease is asked for in Redis, behind the queries; here the lender answers at once,
so that only the bucket's part of it is in the figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bench import loops
from bench.micro import TWIN, Micro, Repeated
from ogelproxy._bucket import TokenBucket
from ogelproxy.limiter import TRICKLE_TTL
from tests import reference

#: Tokens per second, never lacking and always lacking.
PLENTY = 1e9
NOTHING = 0.0
#: Seconds from one query to the next.
STEP = 1e-3
TAKEN = "taken"
REFUSED = "refused"
LEASED = "taken of a lease"


class BucketCase(Micro):
    name = "bucket"
    about = "a token for a query, or none"
    title = "Time to take a token"
    unit = "token"
    names = (TAKEN, REFUSED, LEASED)

    @contextmanager
    def opened(self, implementation: str) -> Iterator[Mapping[str, Repeated]]:
        if implementation == TWIN:
            yield {
                TAKEN: _takes(reference.TokenBucket(PLENTY, PLENTY, 0.0)),
                REFUSED: _takes(reference.TokenBucket(NOTHING, NOTHING, 0.0)),
            }
            return
        takes = loops.load().Takes
        lender = Lender()
        leased = TokenBucket(PLENTY, PLENTY, 0.0, lender, is_leased=True)
        lender.ask(leased)
        yield {
            TAKEN: takes(TokenBucket(PLENTY, PLENTY, 0.0), 0.0, STEP),
            REFUSED: takes(TokenBucket(NOTHING, NOTHING, 0.0), 0.0, STEP),
            LEASED: takes(leased, 0.0, STEP),
        }


CASE = BucketCase()


class Lender:
    """Grants what a bucket asks for, as the limiter does when Redis did."""

    def ask(self, bucket: TokenBucket) -> None:
        now = bucket.stamp
        bucket.ask(now)
        bucket.answer(
            now,
            chunk=0.0,
            dropped=0.0,
            chunk_until=now,
            trickle_rate=PLENTY,
            trickle_capacity=PLENTY,
            trickle_until=now + TRICKLE_TTL,
            dry_until=now,
        )

    def wake(self, bucket: TokenBucket, wait: float) -> None:
        """Nobody waits."""


def _takes(bucket: reference.TokenBucket) -> Repeated:
    def loop(count: int) -> None:
        now = bucket.stamp
        for _ in range(count):
            now += STEP
            bucket.take(now, 1)

    return loop
