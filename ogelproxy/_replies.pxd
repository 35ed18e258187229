cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:  # what was asked, so which message ends the reply
    ASKED_NOTHING     # what the server ignored
    ASKED_PARSE       # 1
    ASKED_BIND        # 2
    ASKED_CLOSE       # 3
    ASKED_DESCRIBE    # T or n, after a t for a statement
    ASKED_EXECUTE     # C, I or s
    ASKED_SYNC        # Z
    ASKED_QUERY       # Z
    ASKED_FUNCTION    # Z

cdef enum:
    MAX_OWED = 16384  # replies owed to one client at which it is no longer read

cdef enum:  # what becomes of the reply
    REPLY_FORWARD = 0
    REPLY_SKIP        # the proxy asked for itself: the client never sees it
    REPLY_RESTORE     # likewise, but for what it reports of settings
    REPLY_PROBE       # likewise, a row that tells of the session's state
    REPLY_FAKE        # the server was never asked: the proxy answers
    REPLY_REFUSE      # made to fail on the server: its error is replaced


cdef struct Reply:
    uint8_t asked
    uint8_t action
    uint8_t failed          # an ErrorResponse came
    uint8_t is_unnamed      # PARSE of the unnamed statement
    char sqlstate[5]        # of that error
    uint8_t is_rewritten    # QUERY with names of the server's in it
    uint32_t queries        # queries that this counts as
    uint32_t complexity     # hundredths
    uint64_t fingerprint    # of the query; of a PARSE without a name its serial
    uint64_t bytes_in       # bytes of the request
    uint64_t rows
    double started          # monotonic seconds at which it was sent
    double queued           # seconds it waited for a server
    double throttled        # seconds it waited for a token
    PyObject* thing         # owned: a Naming or Rewriting, bytes of a REFUSE


@cython.final
cdef class Replies:
    # A ring of the replies that a server owes, oldest first.
    cdef Reply* ring
    cdef uint32_t capacity   # a power of two
    cdef uint32_t first      # index of the oldest, modulo capacity
    cdef uint32_t count
    cdef uint64_t popped     # replies that were taken off, ever

    cdef Reply* push(self, uint8_t asked, uint8_t action) except NULL
    cdef inline Reply* head(self) noexcept:
        return self.ring + self.first if self.count else NULL

    cdef inline Reply* last(self) noexcept:
        return self.at(self.count - 1) if self.count else NULL

    cdef inline uint64_t pushed(self) noexcept:
        """How many were ever pushed; the latest is answered once so many popped."""
        return self.popped + self.count

    cdef inline Reply* at(self, uint32_t index) noexcept:
        return self.ring + ((self.first + index) & (self.capacity - 1))

    cdef void pop(self) noexcept
    cdef void clear(self) noexcept
