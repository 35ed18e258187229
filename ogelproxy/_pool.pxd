from libc.stdint cimport uint64_t

from ogelproxy._connection cimport Connection
from ogelproxy._statements cimport StatementCache


cdef enum:
    MODE_SESSION
    MODE_TRANSACTION
    MODE_STATEMENT
    MODE_AUTO


cdef class Settings:
    # Session settings that a client asked for, or a server has.
    # One object for equal settings, so that comparing is comparing pointers.
    cdef readonly tuple items        # (name, value) pairs, sorted; names in lower case
    cdef readonly tuple parsing      # those of them that a Parse may depend on
    cdef public bytes restore        # query that sets again what a RESET undid, or None
    cdef public object statuses      # bytes of the ParameterStatus messages, or None


cdef class Pooled(Connection):
    # A connection that a pool may hold.
    cdef public Settings settings    # what it is set to; None when not known


cdef class PoolCore:
    cdef list idle                   # servers nobody uses, the latest last; then None
    cdef readonly Py_ssize_t idle_count
    cdef object waiters              # deque of clients that wait for a server
    cdef readonly object provers     # deque of futures that want a server first
    cdef public Settings baseline    # what a fresh server connection has
    cdef readonly int mode
    cdef uint64_t clients_seen       # ever
    cdef readonly StatementCache statements
    cdef public int size             # server connections: idle, lent or being reset
    cdef public int max_prepared     # statements kept prepared on one server
    cdef public int epoch            # servers of an earlier epoch are not used again
    cdef public int surplus          # servers to hand over when their loans end
    cdef public double tenure        # seconds after its login that one may be so

    cdef Connection take(self, Settings wanted)
    cdef int wait(self, Connection client) except -1
    cdef int forget(self, Connection client) except -1
    cdef Connection next_waiter(self)
    cdef int give(self, Connection server) except -1
