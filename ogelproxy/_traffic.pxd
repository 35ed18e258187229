cimport cython
from libc.stdint cimport uint64_t


cdef enum:
    BUCKETS = 19  # metrics.LATENCY_BOUNDS and infinity


@cython.final
cdef class Traffic:
    # What is watched of one target, by the tier its clients came with: plain numbers,
    # changed per query, which a scrape or an operator reads.
    cdef readonly str tier
    cdef readonly str database_type
    cdef public uint64_t logins
    cdef readonly uint64_t loans          # times that a server was lent
    cdef readonly uint64_t queries
    cdef readonly uint64_t transactions   # ended ones, a lone query is one too
    cdef readonly uint64_t client_parses  # named statements that clients prepared
    cdef readonly uint64_t server_parses  # and that servers were asked to
    cdef readonly uint64_t binds
    cdef readonly double query_seconds
    cdef readonly double transaction_seconds
    cdef readonly double wait_seconds     # that clients waited for servers
    cdef uint64_t counts[BUCKETS]     # answered queries by their latency
    cdef readonly double seconds      # sum of the latencies
    cdef readonly uint64_t bytes_in
    cdef readonly uint64_t bytes_out
    cdef readonly uint64_t delayed    # queries that waited for a token
    cdef readonly uint64_t refused
    cdef readonly uint64_t warned
    cdef readonly uint64_t flight_waits  # queries that waited for others in flight
    cdef double bounds[BUCKETS]

    cdef void observe(self, double seconds) noexcept
