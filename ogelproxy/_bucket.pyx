"""TokenBucket: how many queries one tenant may still send.

Knows no clock, no tenant and no Redis: the caller says what time it is, the
limiter says how fast and how large, and brings what it leased. Its neighbours are
`limiter`, which keeps one per tenant, and the clients, which take from it for each
query and wait in its queue.
"""

from collections import OrderedDict

cimport cython
from libc.math cimport INFINITY, ceil, isfinite

ENFORCE = MODE_ENFORCE
WARN = MODE_WARN
OFF = MODE_OFF

# Seconds added to a wait, so that rounding of clock and level never makes a
# query come back a moment too early, only to be sent away for a nanosecond.
cdef double MARGIN = 1e-6

# Seconds over which demand is averaged.
cdef double DEMAND_PERIOD = 0.25

# Seconds before the end of a lease that is in use at which its renewal is asked for:
# what a trickle leaves is kept then, and nobody waits for the answer.
cdef double RENEWAL = 0.03


@cython.final
cdef class TokenBucket:

    def __cinit__(
        self, double rate, double capacity, double now, keeper=None,
        *, bint is_leased=False,
    ):
        check(rate, capacity)
        self.rate = rate
        self.capacity = capacity
        self.mode = MODE_ENFORCE
        self.keeper = keeper
        self.queue = OrderedDict()
        self.is_leased = is_leased
        self.stamp = self.asked_at = now
        self.renew_at = INFINITY
        if not is_leased:
            self.own_rate = rate
            self.own = self.own_capacity = capacity
            self.own_until = INFINITY

    def __repr__(self):
        return (
            f"TokenBucket(rate={self.rate:g}, capacity={self.capacity:g}, "
            f"level={self.level:.3f})"
        )

    @property
    def level(self):
        return self.own + self.trickle + self.chunk

    def level_at(self, double now):
        self.refill(now)
        return self.level

    cdef void refill(self, double now) noexcept:
        cdef double minted
        # A clock that steps back grants nothing until it has caught up: the
        # time between was paid out already.
        if now <= self.stamp:
            return
        if now >= self.own_until:
            self.own = 0
        elif now > self.own_from:
            minted = (now - max(self.stamp, self.own_from)) * self.own_rate
            self.own = min(self.own_capacity, self.own + minted)
        if self.is_leased:
            # Looked at before each spend: who was frozen finds nothing.
            if now >= self.chunk_until:
                self.chunk = 0
            if now >= self.trickle_until:
                self.trickle = self.trickle_rate = 0
            else:
                minted = min(
                    (now - self.stamp) * self.trickle_rate,
                    self.trickle_capacity - self.trickle,
                )
                self.trickle += minted
                self.minted += minted
        self.stamp = now

    cdef double tokens(self, double now) noexcept:
        """What a newcomer may take now: those who wait come first."""
        self.refill(now)
        return self.own + self.trickle + self.chunk - self.owed

    cdef bint spend(self, double now, double count) noexcept:
        cdef double part
        self.refill(now)
        if count > self.own + self.trickle + self.chunk:
            return False
        # What can't be given back goes first.
        part = min(count, self.own)
        self.own -= part
        count -= part
        part = min(count, self.trickle)
        self.trickle -= part
        # Differences of sums may leave a rounding below nothing.
        part = min(count - part, self.chunk)
        self.chunk -= part
        self.chunk_spent += part
        return True

    cdef double wait_for(self, double now, double ahead, double count) noexcept:
        """Seconds until `count` tokens are there, once `ahead` were taken.

        Sets `must_ask` when only the lender can tell.
        """
        cdef double lacking = ahead + count - (self.own + self.trickle + self.chunk)
        cdef double rate = self.own_rate if now < self.own_until else 0
        cdef double room = self.own_capacity if rate else 0
        cdef double wait
        self.must_ask = False
        if count > self.capacity or self.rate == 0:
            return INFINITY
        if not self.is_leased:
            # From `stamp`, which is later than `now` if the clock stepped back.
            return lacking / rate + (self.stamp - now) + MARGIN
        if (
            self.trickle_rate
            and now < self.renew_at
            and count <= room + self.trickle_capacity + self.chunk
        ):
            # All that the lender could give; what comes after it will be alike.
            return lacking / (rate + self.trickle_rate) + MARGIN
        if now >= self.dry_until:
            self.must_ask = True
            return MARGIN
        # The whole tenant gets no more than its rate.
        wait = max(self.dry_until - now, lacking / self.rate)
        if rate and count <= room:
            wait = min(wait, max(lacking / rate, self.own_from - now) + MARGIN)
        return wait

    cpdef double take(self, double now, uint32_t count) noexcept:
        cdef double wait
        if self.mode == MODE_OFF:
            return 0.0
        self.must_ask = False
        if count <= self.tokens(now):
            self.spend(now, count)
            self.admitted += count
            if now >= self.renew_at:
                self.renew_at = INFINITY
                self.keeper.ask(self)
            return 0.0
        wait = self.wait_for(now, self.owed, count)
        if self.must_ask:
            return wait
        if self.mode == MODE_WARN:
            self.warned += count
            return -wait
        self.refused += count
        return wait

    cpdef void refund(self, uint32_t count) noexcept:
        # What was let pass while the limiter was off never left the bucket.
        cdef double part
        cdef double taken = min(<uint64_t> count, self.admitted)
        self.admitted -= <uint64_t> taken
        if not self.is_leased:
            self.own = min(self.own_capacity, self.own + taken)
            return
        # Never more than the lender knows to be here: what was spent of a chunk
        # since it was last told, then what a trickle may hold.
        part = min(taken, self.chunk_spent)
        self.chunk += part
        self.chunk_spent -= part
        if self.trickle_rate:
            self.trickle = min(self.trickle_capacity, self.trickle + taken - part)

    def configure(self, double rate, double capacity, double now):
        check(rate, capacity)
        self.refill(now)
        self.rate = rate
        self.capacity = capacity
        if not self.is_leased:
            self.own_rate = rate
            self.own_capacity = capacity
            self.own = min(self.own, capacity)

    def is_full(self, double now):
        self.refill(now)
        return not self.is_leased and self.own >= self.own_capacity

    # Leases.

    def set_floor(self, double rate, double capacity, double since, double until):
        check(rate, capacity)
        self.own_rate = rate
        self.own_capacity = capacity
        self.own = min(self.own, capacity)
        self.own_from = since
        self.own_until = until

    def ask(self, double now):
        cdef double returned = 0
        cdef double lacking = 1
        cdef uint64_t total = self.admitted + self.refused + self.warned
        cdef double elapsed = max(now - self.asked_at, 0.0)
        self.refill(now)
        self.demand *= 1 - min(1.0, elapsed / DEMAND_PERIOD)
        self.demand += (
            (total - self.asked_total) + self.owed
        ) / max(elapsed, DEMAND_PERIOD)
        self.asked_total = total
        self.asked_at = now
        # The lender takes a trickle for ended once it is asked, and what it left
        # for a part of the chunk.
        if self.trickle > 0:
            self.chunk_until = (
                min(self.chunk_until, self.trickle_until)
                if self.chunk > 0 else self.trickle_until
            )
            self.chunk += self.trickle
        self.trickle = self.trickle_rate = 0
        self.chunk_spent = 0
        self.renew_at = INFINITY
        self.is_asking = True
        self.must_ask = False
        if self.queue:
            # For who is first: the others can be served one by one.
            lacking = next(iter(self.queue.values())) - self.own - self.chunk
            lacking = ceil(max(lacking, 1))
        elif self.is_settling:
            returned, self.chunk = self.chunk, 0
            lacking = 0
        self.is_settling = False
        return self.chunk, lacking, self.demand, self.minted, returned

    def answer(
        self, double now, *, double chunk, double dropped, double chunk_until,
        double trickle_rate, double trickle_capacity, double trickle_until,
        double dry_until,
    ):
        self.is_asking = False
        self.refill(now)
        self.chunk = max(0.0, self.chunk - dropped) + chunk
        self.chunk_until = chunk_until
        self.trickle = 0
        if trickle_rate:
            self.minted = 0
        self.trickle_rate = trickle_rate
        self.trickle_capacity = trickle_capacity
        self.trickle_until = trickle_until
        self.dry_until = dry_until
        # It may have come too late for what it brings.
        if now >= chunk_until:
            self.chunk = 0
        if now >= trickle_until:
            self.trickle_rate = 0
        if self.trickle_rate:
            self.renew_at = trickle_until - RENEWAL
        elif self.chunk > 0:
            self.renew_at = chunk_until - RENEWAL
        self.serve(now, has_changed=True)

    def fail(self, double now, double dry_until):
        self.is_asking = False
        self.dry_until = dry_until
        self.serve(now, has_changed=True)

    # Who waits.

    def join(self, client, uint32_t count, double now):
        cdef bint is_first = not self.queue
        self.queue[client] = count
        self.owed += count
        if self.is_asking:
            return
        if self.must_ask:
            self.must_ask = False
            self.keeper.ask(self)
        elif is_first:
            self.wake(now, count)

    def leave(self, client):
        count = self.queue.pop(client, 0)
        self.owed -= count

    def serve(self, double now, *, bint has_changed=False):
        while self.queue and self.mode == MODE_ENFORCE:
            client, count = next(iter(self.queue.items()))
            if not self.spend(now, count):
                break
            self.admitted += count
            self.leave(client)
            client.grant(count)
        if self.queue and self.mode != MODE_ENFORCE:
            # Nobody has to wait any more.
            self.send_back(list(self.queue))
        if self.is_asking:
            return
        if has_changed and self.queue:
            self.wait_for(now, 0, next(iter(self.queue.values())))
            if not self.must_ask:
                self.send_back(self.late(now))
        if self.queue:
            self.wake(now, next(iter(self.queue.values())))
        elif now >= self.renew_at:
            # Nobody wanted it any more. Little is not worth a question: it is lost.
            if self.trickle_rate or self.chunk > max(1, self.capacity / 20):
                self.is_settling = True
                self.keeper.ask(self)
            else:
                self.renew_at = INFINITY
        elif self.is_leased:
            self.keeper.wake(self, self.renew_at - now)

    cdef int wake(self, double now, uint32_t count) except -1:
        """Have the first of the queue, who needs `count`, served when it can be."""
        cdef double wait
        if self.is_asking:
            return 0
        wait = self.wait_for(now, 0, count)
        if self.must_ask:
            self.must_ask = False
            self.keeper.ask(self)
        else:
            self.keeper.wake(self, min(wait, max(self.renew_at - now, 0)))
        return 0

    cdef list late(self, double now):
        """Those in the queue who can't wait for as long as it takes."""
        cdef double ahead = 0
        late = []
        for client, count in self.queue.items():
            if now + self.wait_for(now, ahead, count) > client.wait_until(now):
                late.append(client)
            else:
                ahead += count
        self.must_ask = False
        return late

    cdef int send_back(self, list clients) except -1:
        """Let them try again, and find out for themselves."""
        for client in clients:
            self.leave(client)
            client.retry()
        return 0


cdef int check(double rate, double capacity) except -1:
    if not (isfinite(rate) and rate >= 0 and isfinite(capacity) and capacity >= 0):
        raise ValueError(
            f"a bucket of rate {rate:g} and capacity {capacity:g} can't be"
        )
    return 0
