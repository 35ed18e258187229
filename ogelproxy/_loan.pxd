from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ogelproxy._flights cimport Flights, Flying
from ogelproxy._pool cimport PoolCore, Pooled, Settings
from ogelproxy._replies cimport Replies, Reply
from ogelproxy._statements cimport Naming, Statement
from ogelproxy._traffic cimport Traffic
from ogelproxy._usage cimport Attribution, UsageTable


cdef enum:  # ServerCore.phase
    SERVER_LOGIN      # a coroutine owns it
    SERVER_IDLE       # in its pool
    SERVER_LENT       # in a client's hands
    SERVER_RESETTING  # finishing with, or forgetting, its last client
    SERVER_CLOSED

cdef class Borrower(Flying):
    # What a server knows of the client it is lent to.
    cdef readonly PoolCore pool
    cdef readonly Lendable server   # the loan, or None; changed by lend and release
    cdef Attribution who              # to whom queries are counted
    cdef UsageTable usage
    cdef Traffic traffic
    cdef Py_ssize_t body_left         # bytes of a request still to be forwarded
    cdef bint is_batch_open           # messages went out since the last Sync
    cdef bint is_dropping             # a failed batch: dropped up to its Sync
    cdef bint is_leaving              # it said goodbye; what it asked for is to come
    cdef bint is_stalled              # answers must come before more is read
    cdef bytes notice                 # a NoticeResponse to send at the next boundary
    cdef uint64_t serial              # tells clients apart
    cdef public Settings startup      # what RESET takes it back to
    cdef public Settings settings     # what its sessions are to be set to
    cdef public object touched        # names of settings that it may have changed
    cdef public uint32_t held_by      # state that pins it to its server: FLAG_
    cdef Statement unnamed            # its unnamed statement, or None
    cdef uint64_t unnamed_serial      # which Parse made it

    cdef int touch(self, bytes name) except -1
    cdef int left(self) except -1
    cdef int unstall(self) except -1
    cdef int names_skipped(self, list changes) except -1
    cdef int unnamed_lost(self, uint64_t serial) except -1
    cdef int statements_dropped(self) except -1
    cdef int server_gone(self, bint may_tell) except -1
    cdef int server_released(self) except -1
    cdef bytes renumbered(self, bytes notification)
    cdef bytes reword(self, bytes body, list replaced)


cdef class Lendable(Pooled):
    # A server connection as loans see it.
    cdef public object host           # the engine's Relay: what leaves the fast path
    cdef readonly PoolCore pool
    cdef readonly Borrower client     # the borrower, or None
    cdef Flights flights              # counts what it does for a client that is gone
    cdef Replies replies
    cdef public int phase
    cdef uint8_t status               # of the last ReadyForQuery: I, T or E
    cdef Py_ssize_t body_left         # bytes of a reply still to be forwarded
    cdef bint body_dropped            # they go to nobody
    cdef dict prepared                # Statement: None, those it has
    cdef uint64_t unnamed_serial      # which client's Parse its unnamed statement is
    cdef public object question       # what the probe under way asks; `pool`'s
    cdef uint32_t flags               # session state that may have been made or ended
    cdef uint64_t lent_to             # serial of its latest client
    cdef bint has_foreign_sequences   # currval() would tell of another's nextval()
    cdef readonly bint had_error      # since the last probe
    cdef uint32_t probing             # likewise, of before the probe under way
    cdef uint32_t dirt                # state to be taken away when this loan ends
    cdef uint64_t rows                # of the reply at the head
    cdef uint64_t bytes_out           # sent to the client since the last count
    cdef double transaction_at        # when the transaction began
    cdef double last_done             # when the reply before this one ended
    cdef readonly double idle_since
    cdef public double opened_at
    cdef public double expires_at     # end of its lifetime, 0 for never
    cdef public int epoch
    cdef public int cancels           # cancel requests under way: not lent meanwhile
    cdef bint in_copy                 # it waits for CopyData
    cdef bint ignores_sync            # in COPY IN, until the client ends it
    cdef list copy_ends               # replies asked for before each end of a COPY IN
    cdef bint was_reset               # a RESET undid settings of the client's start
    cdef bint told_why                # it sent a FATAL error to the client
    cdef public bint is_retiring      # to be closed when its loan ends
    cdef public uint32_t process_id   # from BackendKeyData
    cdef public bytes cancel_key

    cdef int lend(self, Borrower client) except -1
    cdef int settle(self) except -1
    cdef bint is_settled(self) noexcept
    cdef bint is_lendable(self) noexcept
    cdef int release(self) except -1
    cdef bint probe(self) except -1
    cdef bint owes_itself(self) noexcept
    cdef int part(self, uint32_t flags) except -1
    cdef int drop_client(self) except -1
    cdef int finish_alone(self) except -1
    cdef int fly_alone(self) except -1
    cdef int fakes(self) except -1
    cdef int copy_ended(self) except -1
    cdef int copy_begun(self) except -1
    cdef void count(self, Reply* reply) noexcept
    cdef int restore(self) except -1
    cdef int count_rest(self, bint is_lost) except -1
    cdef int forget_sequences(self) except -1
    cdef int ask_query(self, bytes message) except -1
    cdef int make_room(self) except -1
    cdef int prepare_sql(self, Naming naming) except -1
    cdef int prepare(self, Naming naming, uint8_t action) except -1
