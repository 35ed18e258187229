# A tenant's token bucket. Time is an argument: seconds of a monotonic clock.

cimport cython
from libc.stdint cimport uint32_t, uint64_t


cdef enum:  # TokenBucket.mode, what happens without enough tokens
    MODE_ENFORCE = 0  # refuse
    MODE_WARN = 1     # let pass, and tell
    MODE_OFF = 2      # count nothing, take nothing


@cython.final
cdef class TokenBucket:
    cdef readonly double rate      # tokens per second of the tenant, everywhere
    cdef readonly double capacity  # tokens in the tenant's full bucket
    cdef public int mode           # one of MODE_; the limiter changes it
    cdef public double max_wait    # seconds a query may wait for tokens
    cdef readonly uint64_t admitted  # tokens taken and not given back
    cdef readonly uint64_t refused   # tokens asked for in vain, once per take
    cdef readonly uint64_t warned    # tokens that were lacking in MODE_WARN

    # What is minted here without asking: all of it, or with leases the floor.
    cdef double own_rate
    cdef double own_capacity
    cdef double own          # tokens there were at `stamp`
    cdef double own_from     # minted from then on
    cdef double own_until    # and until then, when all of it is void
    cdef readonly double stamp  # the latest time seen

    # What was leased; void at its end, whatever is left.
    cdef readonly bint is_leased
    cdef double chunk          # tokens granted at once
    cdef double chunk_until
    cdef double chunk_spent    # of them since the latest ask: so many may come back
    cdef double trickle        # tokens minted at `trickle_rate` and not yet spent
    cdef double trickle_rate   # 0 while there is no trickle
    cdef double trickle_capacity
    cdef double trickle_until
    cdef double minted             # by the latest trickle, spent or not
    cdef double renew_at           # when to ask for what is running out
    cdef bint is_settling          # the next question gives back what is left
    cdef readonly bint must_ask    # the latest take failed, and more may be had
    cdef readonly bint is_asking   # from `ask` to `answer`
    cdef readonly double dry_until  # before then it's in vain to ask
    cdef double asked_at           # when the latest ask began
    cdef uint64_t asked_total      # admitted, refused and warned then
    cdef readonly double demand    # tokens per second that were wanted lately

    # Who waits, in order, and for how many tokens: clients by `join`.
    cdef readonly object queue
    cdef double owed      # tokens that they wait for
    cdef object keeper    # the limiter: asks, and wakes
    cdef object __weakref__  # how the limiter sees that nobody holds it

    cdef void refill(self, double now) noexcept
    cdef double tokens(self, double now) noexcept
    cdef bint spend(self, double now, double count) noexcept
    cdef double wait_for(self, double now, double ahead, double count) noexcept
    cdef int wake(self, double now, uint32_t count) except -1
    cdef list late(self, double now)
    cdef int send_back(self, list clients) except -1
    cpdef double take(self, double now, uint32_t count) noexcept
    cpdef void refund(self, uint32_t count) noexcept
