# A tenant's token bucket. Time is an argument: seconds of a monotonic clock.

cimport cython
from libc.stdint cimport uint32_t, uint64_t


cdef enum:  # TokenBucket.mode, what happens without enough tokens
    MODE_ENFORCE = 0  # refuse
    MODE_WARN = 1     # let pass, and tell
    MODE_OFF = 2      # count nothing, take nothing


@cython.final
cdef class TokenBucket:
    cdef readonly double rate      # tokens per second
    cdef readonly double capacity  # tokens in a full bucket
    cdef readonly double level     # tokens there were at `stamp`
    cdef readonly double stamp     # the latest time seen
    cdef public int mode           # one of MODE_; the limiter changes it
    cdef public double max_wait    # seconds a query may wait for tokens
    cdef readonly uint64_t admitted  # tokens taken and not given back
    cdef readonly uint64_t refused   # tokens asked for in vain, once per take
    cdef readonly uint64_t warned    # tokens that were lacking in MODE_WARN
    cdef object __weakref__          # how the limiter sees that nobody holds it

    cdef void refill(self, double now) noexcept
    cpdef double take(self, double now, uint32_t count) noexcept
    cpdef void refund(self, uint32_t count) noexcept
