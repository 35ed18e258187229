cimport cython
from libc.stdint cimport uint64_t


cdef enum:
    BUCKETS = 19  # metrics.LATENCY_BOUNDS and infinity


@cython.final
cdef class Traffic:
    # What is watched of one tier and database type: plain numbers, changed per
    # query, which a scrape reads.
    cdef readonly str tier
    cdef readonly str database_type
    cdef uint64_t counts[BUCKETS]     # answered queries by their latency
    cdef readonly double seconds      # sum of the latencies
    cdef readonly uint64_t bytes_in
    cdef readonly uint64_t bytes_out
    cdef readonly uint64_t delayed    # queries that waited for a token
    cdef readonly uint64_t refused
    cdef readonly uint64_t warned
    cdef double bounds[BUCKETS]

    cdef void observe(self, double seconds) noexcept
