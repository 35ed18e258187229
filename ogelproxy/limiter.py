"""Limiter: whether a query may run. One bucket per organisation, in this process.

Makes the buckets, shapes them after the tenant, and words the refusal; taking
tokens is `TokenBucket`'s, and waiting for them the relay's. How many connections
there may be is `gate`'s.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ogelproxy._bucket import ENFORCE, OFF, WARN, TokenBucket
from ogelproxy.config import Limits
from ogelproxy.errors import RateLimited
from ogelproxy.tenants.model import LimiterMode, Tenant

__all__ = ["Limiter", "TokenBucket"]

MODES = {
    LimiterMode.ENFORCE: ENFORCE,
    LimiterMode.WARN: WARN,
    LimiterMode.OFF: OFF,
}

#: Refusals within the interval, in seconds, that make the hint speak of upgrading.
PROMPT_REFUSALS = 5
PROMPT_INTERVAL = 60.0

#: Old buckets looked at for each new one: two, so that the table shrinks.
SWEPT_AT_ONCE = 2


@dataclass(slots=True)
class _Record:
    """What the limiter remembers beside a bucket."""

    version: int  # of the tenant that shaped the bucket
    refusals: int = 0  # since `refused_from`
    refused_from: float = -math.inf  # when the interval of refusals began


class Limiter:
    """The buckets of one process, by organisation.

    A bucket lives while somebody holds it or while it isn't full: a new one is
    born full, so dropping any other would give tokens away.
    """

    def __init__(self, config: Limits, clock: Callable[[], float]) -> None:
        self.config = config  # the relay asks it how long transactions may wait
        self._clock = clock
        #: Told of a tenant each time that it is refused, having been so often.
        self.prompted: Callable[[Tenant], None] = lambda tenant: None
        # Both have the same keys; the order is that of the last look.
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._records: dict[str, _Record] = {}

    def __len__(self) -> int:
        """Return how many buckets are kept."""
        return len(self._buckets)

    def bucket(self, tenant: Tenant) -> TokenBucket:
        """Return the bucket of all the organisation's connections."""
        bucket = self._buckets.get(tenant.handle)
        if bucket is None:
            self._sweep()
            bucket = self._buckets[tenant.handle] = TokenBucket(
                tenant.tier.max_queries_per_second,
                tenant.tier.bucket_capacity,
                self._clock(),
            )
            self._records[tenant.handle] = _Record(tenant.version)
        self._shape(bucket, tenant)
        return bucket

    def update(self, tenant: Tenant) -> None:
        """Carry a change of tier, mode or `max_wait` to the live bucket at once."""
        bucket = self._buckets.get(tenant.handle)
        if bucket is not None:
            self._shape(bucket, tenant)

    def forget(self, handle: str) -> None:
        """Drop the bucket, if it is full and nobody holds it."""
        if handle in self._buckets:
            self._let_go(handle)

    def refusal(
        self, bucket: TokenBucket, tenant: Tenant | None, wait: float
    ) -> RateLimited:
        """Make the error, or the notice, for a query that met the limit.

        `wait` is what the bucket's `take` returned, of either sign. Without a
        tenant, whose record may have gone meanwhile, no tier is named.
        """
        hint = _advice(bucket, abs(wait))
        detail = f"limit={bucket.rate:.10g}/s"
        if tenant is None:
            return RateLimited(detail=detail, hint=hint)
        if self._is_repeated(tenant.handle):
            hint += "; you meet this limit often: upgrade for a higher one"
            self.prompted(tenant)
        return RateLimited(
            f"{tenant.handle} met its limit of {bucket.rate:.10g}/s",
            detail=f"tier={tenant.tier.name} {detail}",
            hint=hint,
        )

    def _shape(self, bucket: TokenBucket, tenant: Tenant) -> None:
        record = self._records[tenant.handle]
        if tenant.version < record.version:
            return  # a login that began before the change
        record.version = tenant.version
        rate, capacity = tenant.tier.max_queries_per_second, tenant.tier.bucket_capacity
        if (bucket.rate, bucket.capacity) != (rate, capacity):
            bucket.configure(rate, capacity, self._clock())
        bucket.mode = MODES[tenant.limiter_mode]
        bucket.max_wait = tenant.max_wait

    def _sweep(self) -> None:
        for _ in range(min(SWEPT_AT_ONCE, len(self._buckets))):
            self._let_go(next(iter(self._buckets)))

    def _let_go(self, handle: str) -> None:
        if not self._buckets[handle].is_full(self._clock()):
            self._buckets.move_to_end(handle)
            return
        # Let go and see: a bucket that somebody holds is still there, and comes
        # back before anything else can happen.
        watch = weakref.ref(self._buckets.pop(handle))
        bucket = watch()
        if bucket is None:
            del self._records[handle]
        else:
            self._buckets[handle] = bucket

    def _is_repeated(self, handle: str) -> bool:
        record = self._records.get(handle)
        if record is None:
            return False
        now = self._clock()
        if now - record.refused_from > PROMPT_INTERVAL:
            record.refused_from = now
            record.refusals = 0
        record.refusals += 1
        return record.refusals >= PROMPT_REFUSALS


def _advice(bucket: TokenBucket, wait: float) -> str:
    if math.isinf(wait):
        return f"send at most {math.floor(bucket.capacity)} statements per message"
    # Rounded up, so that who waits as told is not too early.
    return f"retry after {math.ceil(wait * 100) / 100:.2f} s"
