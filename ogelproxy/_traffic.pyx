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

    def add(self, Traffic other not None):
        for index in range(BUCKETS):
            self.counts[index] += other.counts[index]
        self.logins += other.logins
        self.loans += other.loans
        self.queries += other.queries
        self.transactions += other.transactions
        self.client_parses += other.client_parses
        self.server_parses += other.server_parses
        self.binds += other.binds
        self.query_seconds += other.query_seconds
        self.transaction_seconds += other.transaction_seconds
        self.wait_seconds += other.wait_seconds
        self.seconds += other.seconds
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.delayed += other.delayed
        self.refused += other.refused
        self.warned += other.warned
        self.flight_waits += other.flight_waits

    cdef void observe(self, double seconds) noexcept:
        cdef int index = 0
        while index < BUCKETS - 1 and seconds > self.bounds[index]:
            index += 1
        self.counts[index] += 1
        self.seconds += seconds
