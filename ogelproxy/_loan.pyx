"""A server connection in one client's hands: how it is lent and given back.

What a client and its server know of each other. The requests are `_client`'s, the
answers `_server`'s; here is when a loan ends and what must be done to the server
before the next client has it.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy, memset

from ogelproxy._fingerprint cimport (
    FLAG_ADVISORY, FLAG_DEALLOCATE, FLAG_DISCARD, FLAG_HOLD, FLAG_LISTEN, FLAG_LOAD,
    FLAG_PREPARE, FLAG_ROLE, FLAG_SET, FLAG_SET_CONFIG, FLAG_TEMP,
)
from ogelproxy._pool cimport MODE_AUTO, MODE_SESSION
from ogelproxy._replies cimport (
    ASKED_CLOSE, ASKED_PARSE, ASKED_QUERY, REPLY_RESTORE, REPLY_SKIP,
)
from ogelproxy._usage cimport Measure
from ogelproxy._wire cimport HEADER, Gather, put32

cdef enum:
    # What another client must not find on a server: it is reset first, and in
    # auto mode the server stays with the client that made it.
    SESSION_STATE = (
        FLAG_ADVISORY | FLAG_DEALLOCATE | FLAG_DISCARD | FLAG_HOLD | FLAG_LISTEN
        | FLAG_LOAD | FLAG_PREPARE | FLAG_ROLE | FLAG_SET | FLAG_SET_CONFIG | FLAG_TEMP
    )

# Seconds for which a server that was just used is taken to be there: under load
# nothing is asked of the kernel.
cdef double FRESH = 0.001


cdef class Borrower(Connection):

    cdef int unstall(self) except -1:
        return 0

    cdef int names_skipped(self, list changes) except -1:
        return 0

    cdef int unnamed_lost(self, uint64_t serial) except -1:
        return 0

    cdef int statements_dropped(self) except -1:
        return 0

    cdef int server_gone(self, bint may_tell) except -1:
        return 0

    cdef int server_released(self) except -1:
        return 0


cdef class Lendable(Connection):

    def __init__(self, reactor, int fd, host, PoolCore pool):
        Connection.__init__(self, reactor, fd)
        self.host = host
        self.pool = pool
        self.replies = Replies()
        self.prepared = {}
        self.settings = pool.baseline
        self.status = b"I"
        self.epoch = pool.epoch

    @property
    def transaction_status(self):
        return chr(self.status)

    @property
    def owed(self):
        return self.replies.count

    def enter_pool(self):
        """Begin its life in the pool, logged in; hand it to who waits."""
        self.opened_at = self.idle_since = self.reactor.now
        self.settle()

    # Loans.

    cdef int lend(self, Borrower client) except -1:
        self.phase = SERVER_LENT
        self.client = client
        client.server = self
        self.flags = 0
        self.was_reset = False
        self.rows = 0
        self.bytes_out = 0
        client.traffic.loans += 1
        return 0

    cdef bint is_settled(self) noexcept:
        """Nothing is owed, unsent or half-way: another client may have it."""
        return (
            self.replies.count == 0
            and self.status == b"I"
            and self.out_size == 0
            and self.body_left == 0
            and self.client.body_left == 0
            # Flushed, a batch is answered and still open: so is its transaction.
            and not self.client.is_batch_open
        )

    cdef bint is_lendable(self) noexcept:
        """Whether an idle server is there, as far as can be known.

        One that said something is heard first: it may be its end, and of that a
        client has to know before its query is sent. `settle` gives it back.
        """
        if self.reactor.now - self.idle_since < FRESH or self.is_silent():
            return True
        self.phase = SERVER_RESETTING
        return False

    cdef int release(self) except -1:
        """End the loan where the pool mode says so; the server must be settled."""
        cdef Borrower client = self.client
        if self.pool.mode == MODE_SESSION:
            return 0
        if self.pool.mode == MODE_AUTO and self.flags & SESSION_STATE:
            return 0
        self.client = None
        client.server = None
        client.server_released()
        return self.settle()

    cdef int drop_client(self) except -1:
        """End the loan because the client goes away, wherever it stands."""
        cdef bint is_settled = self.is_settled()
        cdef bint is_busy = self.replies.count > 0
        self.count_rest(True)
        if self.pool.mode == MODE_SESSION:
            self.flags |= SESSION_STATE
        self.client.server = None
        self.client = None
        if not is_settled:
            self.phase = SERVER_CLOSED
            self.host.abandon(self, is_busy)
            return 0
        return self.settle()

    cdef int finish_alone(self) except -1:
        """End the loan of a client that said goodbye behind its last request.

        As with Postgres, what it asked for is done all the same.
        """
        if (
            self.replies.count == 0
            or self.client.is_batch_open
            or self.in_copy
            or self.out_size
            or self.body_left
            or self.client.body_left
        ):
            return self.drop_client()
        self.count_rest(False)
        self.flags |= SESSION_STATE
        self.client.server = None
        self.client = None
        self.phase = SERVER_RESETTING
        return self.resume()

    cdef int settle(self) except -1:
        """Go to the next client, to the pool, or to the end."""
        cdef Borrower client
        self.resume()
        if (
            self.is_retiring
            or self.status != b"I"
            or self.epoch != self.pool.epoch
            or self.settings is None
            or 0 < self.expires_at < self.reactor.now
        ):
            self.host.retire(self)
            return 0
        if self.flags & SESSION_STATE:
            self.flags = 0
            self.phase = SERVER_RESETTING
            self.prepared.clear()
            self.unnamed_serial = 0
            self.ask_query(self.host.reset_message)
            self.settings = self.pool.baseline
            return self.flush_gather()
        self.phase = SERVER_IDLE
        self.idle_since = self.reactor.now
        if self.cancels:
            # A cancel on its way must not hit the next client.
            return 0
        while self.pool.provers:
            future = self.pool.provers.popleft()
            if not future.done():
                self.phase = SERVER_LOGIN
                future.set_result(self)
                return 0
        client = <Borrower> self.pool.next_waiter() if self.pool.waiters else None
        if client is None:
            return self.pool.give(self)
        self.lend(client)
        return self.reactor.later(client)

    def cancel_done(self):
        self.cancels -= 1
        if self.cancels == 0 and self.phase == SERVER_IDLE and self.fd >= 0:
            self.settle()

    cdef int restore(self) except -1:
        """Set again what a RESET of the client's took from its start-up packet."""
        cdef bytes query = self.settings.restore
        self.was_reset = False
        if query is not None and self.client is not None and (
            self.status == b"T" or self.pool.mode in (MODE_SESSION, MODE_AUTO)
        ):
            self.unnamed_serial = 0
            self.replies.push(ASKED_QUERY, REPLY_RESTORE)
            self.write(PyBytes_AS_STRING(query), len(query))
        return 0

    # Requests of the proxy's own; the caller flushes the gather.

    cdef int fakes(self) except -1:
        return 0

    cdef int ask_query(self, bytes message) except -1:
        self.unnamed_serial = 0
        self.replies.push(ASKED_QUERY, REPLY_SKIP)
        return self.reactor.gather.copy(PyBytes_AS_STRING(message), len(message))

    cdef int prepare(self, Naming naming, uint8_t action) except -1:
        """Have the server parse a shared statement, making room for it."""
        cdef Gather gather = self.reactor.gather
        cdef Statement statement = naming.after
        cdef Reply* reply
        cdef Statement each
        cdef Statement oldest
        cdef Py_ssize_t name_size = len(statement.server_name) + 1
        cdef Py_ssize_t body_size = len(statement.body)
        cdef char* p
        if len(self.prepared) >= self.pool.max_prepared:
            oldest = None
            for each in self.prepared:
                if oldest is None or each.last_used < oldest.last_used:
                    oldest = each
            del self.prepared[oldest]
            self.replies.push(ASKED_CLOSE, REPLY_SKIP)
            p = gather.reserve(HEADER + 2 + len(oldest.server_name))
            p[0] = b"C"
            put32(p + 1, <uint32_t> (4 + 2 + len(oldest.server_name)))
            p[5] = b"S"
            memcpy(
                p + 6, PyBytes_AS_STRING(oldest.server_name),
                len(oldest.server_name) + 1,
            )
        self.prepared[statement] = None
        if self.client is not None:
            self.client.traffic.server_parses += 1
        reply = self.replies.push(ASKED_PARSE, action)
        Py_INCREF(naming)
        reply.thing = <PyObject*> naming
        p = gather.reserve(HEADER + name_size + body_size)
        p[0] = b"P"
        put32(p + 1, <uint32_t> (4 + name_size + body_size))
        memcpy(p + HEADER, PyBytes_AS_STRING(statement.server_name), name_size)
        memcpy(p + HEADER + name_size, PyBytes_AS_STRING(statement.body), body_size)
        return 0

    # Usage.

    cdef void count(self, Reply* reply) noexcept:
        """Attribute one finished query."""
        cdef Measure measure
        cdef Borrower client = self.client
        cdef double now = self.reactor.now
        if client is None or reply.queries == 0:
            return
        memset(&measure, 0, sizeof(Measure))
        measure.fingerprint = reply.fingerprint
        measure.complexity = reply.complexity
        measure.queries = reply.queries
        measure.failed = reply.failed
        memcpy(measure.sqlstate, reply.sqlstate, 5)
        measure.rows = reply.rows
        measure.bytes_in = reply.bytes_in
        measure.bytes_out = self.bytes_out
        measure.queue_seconds = reply.queued
        measure.throttled_seconds = reply.throttled
        measure.server_seconds = now - max(reply.started, self.last_done)
        client.usage.count(client.who, &measure)
        client.traffic.observe(now - reply.started + reply.queued + reply.throttled)
        client.traffic.bytes_in += reply.bytes_in
        client.traffic.bytes_out += self.bytes_out
        client.traffic.queries += reply.queries
        client.traffic.query_seconds += measure.server_seconds
        client.traffic.wait_seconds += reply.queued
        self.bytes_out = 0
        self.last_done = now

    cdef int count_rest(self, bint is_lost) except -1:
        """Attribute what was sent and will not be answered to the client."""
        cdef uint32_t index
        cdef Reply* reply
        for index in range(self.replies.count):
            reply = self.replies.at(index)
            if is_lost:
                reply.failed = 1
                memcpy(reply.sqlstate, b"08006", 5)
            self.count(reply)
            reply.queries = 0
        if is_lost:
            self.replies.clear()
        return 0
