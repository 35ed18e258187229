"""Flights: how many queries and transactions of one organisation are under way.

A client is counted from its first query until its server is settled, so that the
COMMIT of an open transaction never waits. Who would be too many waits, first in
first out. `flights` keeps one per organisation; clients and servers call it.
"""

from collections import deque


cdef class Flying(Connection):

    cdef int cleared(self) except -1:
        """Its wait is over: it is counted."""
        return 0

    cdef int land(self) except -1:
        """Be counted no longer, if it is: its work is done."""
        if self.is_flying:
            self.is_flying = False
            self.flights.leave()
        return 0


cdef class Flights:

    def __cinit__(self):
        self.waiters = deque()

    @property
    def waiting_count(self):
        return len(self.waiters)

    def shape(self, int most, uint64_t version):
        self.most = most
        self.version = version
        self.admit()

    cdef bint enter(self, Flying client) except -1:
        """Count a client, or have it wait until `cleared`."""
        if self.most and (self.count >= self.most or self.waiters):
            self.waiters.append(client)
            return False
        self.count += 1
        client.is_flying = True
        return True

    cdef int leave(self) except -1:
        self.count -= 1
        if self.most:
            self.admit()
        return 0

    cdef int forget(self, Flying client) except -1:
        """A client no longer waits."""
        try:
            self.waiters.remove(client)
        except ValueError:
            pass
        return 0

    def admit(self):
        """Clear those who may go now."""
        cdef Flying client
        while self.waiters and (self.most == 0 or self.count < self.most):
            client = <Flying> self.waiters.popleft()
            self.count += 1
            client.is_flying = True
            client.cleared()
