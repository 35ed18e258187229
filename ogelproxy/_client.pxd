from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ogelproxy._bucket cimport TokenBucket
from ogelproxy._pool cimport PoolCore, Settings
from ogelproxy._replies cimport Reply
from ogelproxy._loan cimport Borrower


cdef enum:  # what pay() answers
    PAID
    HELD      # the client waits; the message is handled again afterwards
    REFUSED

cdef enum:  # ClientCore.phase
    CLIENT_LOGIN    # a coroutine owns it
    CLIENT_READY    # compiled callbacks carry it
    CLIENT_QUEUED   # waits for a server
    CLIENT_CROWDED  # waits for others of its organisation
    CLIENT_HELD     # waits for a token
    CLIENT_LINGER   # told why it ends; waits for it to close
    CLIENT_CLOSED


cdef class ClientCore(Borrower):
    cdef public object host           # the engine's Relay: what leaves the fast path
    cdef public object session        # who it is: client.Session
    cdef readonly TokenBucket bucket
    cdef readonly int phase
    cdef uint64_t names_doubt         # like names_change, of earlier batches
    cdef bint answers_sync            # the Sync of a dropped batch is answered here
    cdef bint body_dropped            # the rest of this message goes nowhere
    cdef bint is_scanning             # the rest of this message is SQL to be scanned
    cdef readonly double wait         # seconds that the last refused query lacked
    cdef uint32_t prepaid             # tokens taken for the next query
    cdef readonly double waiting_since  # start of a wait for others, 0 for none
    cdef uint32_t granted             # tokens that its wait brought, till used
    cdef double asked_since           # when it began to wait to know, 0 for none
    cdef double held_since            # start of the wait for a token, 0 for none
    cdef double queued                # seconds waited for others for the next query
    cdef double throttled             # seconds waited for a token for it
    cdef readonly double active_at    # when it last sent anything
    cdef object timer                 # of the present wait

    cdef Py_ssize_t process(self, const char* p, Py_ssize_t n) except -1
    cdef int process_inbox(self) except -1
    cdef Py_ssize_t message(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef Py_ssize_t stream(self, const char* p, Py_ssize_t size) except -1
    cdef bint scan_part(self, const char* p, Py_ssize_t size) except -1
    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef int prepare_names(self) except -1
    cdef Py_ssize_t leave(self, Py_ssize_t used) except -1
    cdef Py_ssize_t forward(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef Py_ssize_t drop(self, Py_ssize_t size, Py_ssize_t have) noexcept
    cdef bint borrow(self) except -1
    cdef int begin_loan(self) except -1
    cdef int flush_requests(self) except -1
    cdef int pay(self, uint32_t count) except -1
    cdef void waited(self) noexcept
    cdef int line_up(self, uint32_t count) except -1
    cdef int note(self, uint32_t flags, bytes text) except -1
    cdef Reply* ask(self, uint8_t asked, Py_ssize_t size) except NULL
    cdef int refuse(self, char kind, bytes error) except -1
    cdef int detach(self) except -1
    cdef int detach_wait(self) except -1
    cdef int end(self, bint lingers) except -1
    cdef int gone(self) except -1
