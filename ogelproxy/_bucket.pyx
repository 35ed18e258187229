"""TokenBucket: how many queries one tenant may still send.

Knows no clock, no tenant and no Redis: the caller says what time it is, the
limiter says how fast and how large. Its neighbours are `limiter`, which keeps
one per tenant, and the client's relay, which takes from it for each query.
"""

cimport cython
from libc.math cimport INFINITY, isfinite

ENFORCE = MODE_ENFORCE
WARN = MODE_WARN
OFF = MODE_OFF

# Seconds added to a wait, so that rounding of clock and level never makes a
# query come back a moment too early, only to be sent away for a nanosecond.
cdef double MARGIN = 1e-6


@cython.final
cdef class TokenBucket:

    def __cinit__(self, double rate, double capacity, double now):
        check(rate, capacity)
        self.rate = rate
        self.capacity = capacity
        self.level = capacity
        self.stamp = now
        self.mode = MODE_ENFORCE

    def __repr__(self):
        return (
            f"TokenBucket(rate={self.rate:g}, capacity={self.capacity:g}, "
            f"level={self.level:.3f})"
        )

    cdef void refill(self, double now) noexcept:
        # A clock that steps back grants nothing until it has caught up: the
        # time between was paid out already.
        if now > self.stamp:
            self.level = min(
                self.capacity, self.level + (now - self.stamp) * self.rate
            )
            self.stamp = now

    cpdef double take(self, double now, uint32_t count) noexcept:
        cdef double wait
        if self.mode == MODE_OFF:
            return 0.0
        self.refill(now)
        if count <= self.level:
            self.level -= count
            self.admitted += count
            return 0.0
        if count > self.capacity or self.rate == 0:
            wait = INFINITY
        else:
            # From `stamp`, which is later than `now` if the clock stepped back.
            wait = (count - self.level) / self.rate + (self.stamp - now) + MARGIN
        if self.mode == MODE_WARN:
            self.warned += count
            return -wait
        self.refused += count
        return wait

    cpdef void refund(self, uint32_t count) noexcept:
        # What was let pass while the limiter was off never left the bucket.
        cdef uint64_t taken = min(<uint64_t> count, self.admitted)
        self.admitted -= taken
        self.level = min(self.capacity, self.level + taken)

    def configure(self, double rate, double capacity, double now):
        check(rate, capacity)
        self.refill(now)
        self.rate = rate
        self.capacity = capacity
        self.level = min(self.level, capacity)

    def is_full(self, double now):
        self.refill(now)
        return self.level >= self.capacity


cdef int check(double rate, double capacity) except -1:
    if not (isfinite(rate) and rate >= 0 and isfinite(capacity) and capacity >= 0):
        raise ValueError(
            f"a bucket of rate {rate:g} and capacity {capacity:g} can't be"
        )
    return 0
