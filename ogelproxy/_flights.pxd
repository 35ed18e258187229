from libc.stdint cimport uint64_t

from ogelproxy._connection cimport Connection


cdef class Flying(Connection):
    # A connection that may have work at a server.
    cdef readonly Flights flights    # its organisation's; None until it is logged in
    cdef readonly bint is_flying     # it is counted there

    cdef int cleared(self) except -1
    cdef int land(self) except -1


cdef class Flights:
    cdef readonly int count          # clients, and servers that finish for one gone
    cdef readonly int most           # how many there may be; 0 for any number
    cdef readonly uint64_t version   # of the tenant that said so
    cdef object waiters              # deque of Flying that wait, the first first
    cdef object __weakref__

    cdef bint enter(self, Flying client) except -1
    cdef int leave(self) except -1
    cdef int forget(self, Flying client) except -1
