"""Traffic: what metrics tell of queries, counted where they pass."""

from ogelproxy.metrics import LATENCY_BOUNDS


cdef class Traffic:

    def __init__(self, str tier, str database_type):
        self.tier = tier
        self.database_type = database_type
        for index, bound in enumerate(LATENCY_BOUNDS):
            self.bounds[index] = bound

    @property
    def buckets(self):
        return [self.counts[index] for index in range(BUCKETS)]

    cdef void observe(self, double seconds) noexcept:
        cdef int index = 0
        while index < BUCKETS - 1 and seconds > self.bounds[index]:
            index += 1
        self.counts[index] += 1
        self.seconds += seconds
