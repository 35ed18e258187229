"""A server connection in one client's hands: how it is lent and given back.

What a client and its server know of each other. The requests are `_client`'s, the
answers `_server`'s; here is when a loan ends and what must be done to the server
before the next client has it.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy, memset

from ogelproxy._fingerprint cimport (
    FLAG_ADVISORY, FLAG_ADVISORY_UNLOCK, FLAG_ANY_SETTING, FLAG_CLOSE, FLAG_DDL,
    FLAG_DEALLOCATE, FLAG_DISCARD, FLAG_HOLD, FLAG_LISTEN, FLAG_LOAD, FLAG_OPAQUE,
    FLAG_PREPARE, FLAG_ROLE, FLAG_SEED, FLAG_SEQUENCE, FLAG_SET, FLAG_SET_CONFIG,
    FLAG_TEMP, FLAG_UNLISTEN,
)
from ogelproxy._pool cimport MODE_AUTO, MODE_SESSION, Pooled
from ogelproxy._connection cimport Connection
from ogelproxy._replies cimport (
    ASKED_BIND, ASKED_CLOSE, ASKED_EXECUTE, ASKED_NOTHING, ASKED_PARSE, ASKED_QUERY,
    ASKED_SYNC, MAX_OWED, REPLY_FAKE, REPLY_FORWARD, REPLY_PROBE, REPLY_REFUSE,
    REPLY_RESTORE, REPLY_SKIP,
)
from ogelproxy._usage cimport Measure
from ogelproxy._wire cimport HEADER, put32

cdef enum:
    # Changed settings: told by the server, and followed by the client.
    SETTING = FLAG_SET | FLAG_SET_CONFIG | FLAG_ROLE | FLAG_ANY_SETTING
    # What else another client must not find on a server. In auto mode the server
    # stays with the client while there is any.
    STATE = (
        FLAG_ADVISORY | FLAG_HOLD | FLAG_LISTEN | FLAG_LOAD | FLAG_OPAQUE | FLAG_PREPARE
        | FLAG_SEED | FLAG_SEQUENCE | FLAG_TEMP
    )
    # May end some of it.
    ENDING = (
        FLAG_ADVISORY_UNLOCK | FLAG_CLOSE | FLAG_DEALLOCATE | FLAG_DDL | FLAG_DISCARD
        | FLAG_UNLISTEN
    )
    # After these the proxy doesn't know which statements the server has.
    STATEMENTS = FLAG_PREPARE | FLAG_DEALLOCATE | FLAG_DISCARD | FLAG_OPAQUE
    # What a server is rid of before its next client.
    UNWANTED = SETTING | STATE | FLAG_DEALLOCATE | FLAG_DISCARD


# What servers report and nobody can set.
cdef frozenset UNSETTABLE = frozenset((
    b"in_hot_standby", b"integer_datetimes", b"is_superuser", b"server_encoding",
    b"server_version",
))

# Bind and Execute of the unnamed statement, without parameters.
cdef bytes RUN_UNNAMED = (
    b"B\0\0\0\x0c\0\0\0\0\0\0\0\0" + b"E\0\0\0\x09\0\0\0\0\0"
)

# Seconds for which a server that was just used is taken to be there: under load
# nothing is asked of the kernel.
cdef double FRESH = 0.001


cdef bytes DISCARD_SEQUENCES = b"Q\0\0\0\x16DISCARD SEQUENCES\0"


cdef class Borrower(Flying):

    cdef int touch(self, bytes name) except -1:
        """Note that a setting changed, whoever changed it."""
        if self.pool.mode != MODE_SESSION and name not in UNSETTABLE:
            if self.touched is None:
                self.touched = frozenset()
            self.touched |= {name.decode("latin-1").lower()}
        return 0

    cdef int left(self) except -1:
        return 0

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

    cdef bytes renumbered(self, bytes notification):
        return notification

    cdef bytes reword(self, bytes body, list replaced):
        return body


cdef class Lendable(Pooled):

    def __init__(self, reactor, int fd, host, PoolCore pool):
        Connection.__init__(self, reactor, fd)
        self.host = host
        self.pool = pool
        self.replies = Replies()
        self.prepared = {}
        self.copy_ends = []
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
        self.has_foreign_sequences = self.lent_to != client.serial
        self.lent_to = client.serial
        self.flags = self.probing = self.dirt = 0
        self.ignores_sync = self.had_error = False
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
        cdef uint32_t seen
        if self.copy_ends:
            self.copy_ends.clear()
        if client.is_leaving:
            return client.left()
        if self.pool.mode == MODE_SESSION:
            return client.land()
        if self.flags & FLAG_DDL and not self.flags & FLAG_TEMP:
            # What is prepared may return other columns now.
            self.pool.statements.forget()
        if self.flags or client.touched is not None:
            seen = SETTING | STATE | FLAG_DEALLOCATE
            if client.held_by:
                seen |= ENDING
            if (self.flags & seen or client.touched is not None) and self.probe():
                return 0
        if client.held_by:
            return client.land()
        self.client = None
        client.server = None
        client.land()
        client.server_released()
        return self.settle()

    cdef bint probe(self) except -1:
        """Ask what became of session state, behind the client's back.

        A statement may have failed, been rolled back or ended some state: only
        the server knows. Returns whether there was anything to ask.
        """
        cdef Borrower client = self.client
        if client.touched is not None:
            self.flags |= FLAG_SET
        query = self.pool.question(self, client, self.flags)
        self.probing = self.flags
        self.flags = 0
        self.had_error = False
        self.dirt |= self.probing & FLAG_DEALLOCATE
        if self.pool.mode != MODE_AUTO:
            self.dirt |= self.probing & (STATE | FLAG_ANY_SETTING)
        if query is None:
            self.probing = 0
            if client.touched is not None and self.pool.mode != MODE_AUTO:
                # More than is followed: it goes with the loan.
                self.dirt |= FLAG_ANY_SETTING
            client.touched = None
            return False
        client.touched = None
        self.unnamed_serial = 0
        self.replies.push(ASKED_QUERY, REPLY_PROBE)
        self.write(PyBytes_AS_STRING(query), len(query))
        return True

    cdef bint owes_itself(self) noexcept:
        """What is owed is only the proxy's own, and its client owes nothing."""
        cdef uint32_t index
        cdef Reply* reply
        if self.status != b"I" or self.body_left or self.client.body_left or (
            self.client.is_batch_open
        ):
            return False
        for index in range(self.replies.count):
            reply = self.replies.at(index)
            if reply.asked != ASKED_QUERY or reply.action == REPLY_FORWARD or (
                reply.action == REPLY_REFUSE
            ):
                return False
        return True

    cdef int part(self, uint32_t flags) except -1:
        """Leave the client, with a reply of its own still to come."""
        self.flags |= flags | self.probing | self.client.held_by
        self.client.server = None
        self.client = None
        self.phase = SERVER_RESETTING
        return self.resume()

    cdef int drop_client(self) except -1:
        """End the loan because the client goes away, wherever it stands."""
        cdef bint is_busy = self.replies.count > 0
        cdef uint32_t flags = 0
        if self.pool.mode == MODE_SESSION:
            flags = FLAG_DISCARD
        elif self.client.touched is not None:
            flags = FLAG_ANY_SETTING
        if is_busy and self.owes_itself():
            return self.part(flags)
        if self.is_settled():
            self.part(flags)
            return self.settle()
        self.count_rest(True)
        self.fly_alone()
        self.client.server = None
        self.client = None
        self.phase = SERVER_CLOSED
        self.host.abandon(self, is_busy)
        return 0

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
        self.fly_alone()
        return self.part(FLAG_DISCARD)

    cdef int fly_alone(self) except -1:
        """What runs here goes on counting when its client does not."""
        if self.client.is_flying:
            self.client.is_flying = False
            self.flights = self.client.flights
        return 0

    def land(self):
        """It has ended what it did for a client that is gone."""
        cdef Flights flights = self.flights
        if flights is not None:
            self.flights = None
            flights.leave()

    cdef int settle(self) except -1:
        """Go to the next client, to the pool, or to the end."""
        cdef Borrower client
        cdef uint32_t unwanted
        self.resume()
        if self.flights is not None:
            self.land()
        if (
            self.is_retiring
            or self.status != b"I"
            or self.epoch != self.pool.epoch
            or self.settings is None
            or 0 < self.expires_at < self.reactor.now
        ):
            self.host.retire(self)
            return 0
        if self.pool.surplus > 0 and self.reactor.now - self.opened_at >= (
            self.pool.tenure
        ):
            self.pool.surplus -= 1
            self.host.hand_over(self)
            return 0
        unwanted = (self.flags | self.dirt) & UNWANTED
        self.flags = self.probing = self.dirt = 0
        if unwanted:
            message = self.pool.reset_message(unwanted)
            if message is None:
                self.host.retire(self)
                return 0
            self.phase = SERVER_RESETTING
            if unwanted & STATEMENTS:
                self.prepared.clear()
            if unwanted & (SETTING | STATEMENTS):
                self.settings = self.pool.baseline
            self.ask_query(message)
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
                self.reactor.is_wanted = True
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
        cdef bytes query
        self.was_reset = False
        if self.client is not None:
            query = self.client.startup.restore
            if query is not None:
                self.unnamed_serial = 0
                self.replies.push(ASKED_QUERY, REPLY_RESTORE)
                self.write(PyBytes_AS_STRING(query), len(query))
        return 0

    # Requests of the proxy's own; the caller flushes the gather.

    cdef int forget_sequences(self) except -1:
        """Have lastval() fail rather than tell what another client drew."""
        if (
            self.has_foreign_sequences
            and self.pool.mode != MODE_SESSION
            and self.client.held_by == 0
            and self.replies.count == 0
            and self.status == b"I"
            and not self.client.is_batch_open
        ):
            self.has_foreign_sequences = False
            self.ask_query(DISCARD_SEQUENCES)
        return 0

    cdef int fakes(self) except -1:
        return 0

    # COPY IN: the server ignores each Sync that it reads before the end of the data
    # (manual 55.2.7), and clients send one behind their Execute before they know.

    cdef int copy_ended(self) except -1:
        """The client sends CopyDone or CopyFail."""
        self.ignores_sync = False
        if self.replies.count and len(self.copy_ends) < MAX_OWED:
            self.copy_ends.append(self.replies.pushed())
        return 0

    cdef int copy_begun(self) except -1:
        """CopyInResponse: expect no answers to what the server ignores."""
        cdef uint64_t first = self.replies.popped + 1
        cdef uint64_t end = self.replies.pushed()
        cdef uint64_t index
        cdef bint is_ended = False
        cdef bint was_ignored = False
        cdef bint is_open = True
        cdef Reply* reply
        while self.copy_ends:
            index = self.copy_ends.pop(0)
            if index >= first:
                is_ended = True
                end = index
                break
        for index in range(first, self.replies.pushed()):
            reply = self.replies.at(<uint32_t> (index - self.replies.popped))
            if reply.asked != ASKED_SYNC:
                continue
            if index < end:
                was_ignored = True
                reply.asked = ASKED_NOTHING
                reply.action = REPLY_FAKE
            else:
                is_open = False
        self.ignores_sync = not is_ended
        if was_ignored and is_open and self.client is not None and (
            self.replies.head().asked == ASKED_EXECUTE
        ):
            # The Sync that ends this batch is still to come.
            self.client.is_batch_open = True
        return 0

    cdef int ask_query(self, bytes message) except -1:
        self.unnamed_serial = 0
        self.replies.push(ASKED_QUERY, REPLY_SKIP)
        return self.reactor.gather.copy(PyBytes_AS_STRING(message), len(message))

    cdef int make_room(self) except -1:
        """Close the statement used longest ago if the server has too many."""
        cdef Statement each
        cdef Statement oldest = None
        cdef char* p
        if len(self.prepared) < self.pool.max_prepared:
            return 0
        for each in self.prepared:
            if oldest is None or each.last_used < oldest.last_used:
                oldest = each
        del self.prepared[oldest]
        self.replies.push(ASKED_CLOSE, REPLY_SKIP)
        p = self.reactor.gather.reserve(HEADER + 2 + len(oldest.server_name))
        p[0] = b"C"
        put32(p + 1, <uint32_t> (4 + 2 + len(oldest.server_name)))
        p[5] = b"S"
        memcpy(
            p + 6, PyBytes_AS_STRING(oldest.server_name), len(oldest.server_name) + 1
        )
        return 0

    cdef int prepare(self, Naming naming, uint8_t action) except -1:
        """Have the server parse a shared statement, making room for it."""
        cdef Statement statement = naming.after
        cdef Reply* reply
        cdef Py_ssize_t name_size = len(statement.server_name) + 1
        cdef Py_ssize_t body_size = len(statement.body)
        cdef char* p
        self.make_room()
        self.prepared[statement] = None
        if self.client is not None:
            self.client.traffic.server_parses += 1
        if statement.is_sql:
            return self.prepare_sql(naming)
        reply = self.replies.push(ASKED_PARSE, action)
        Py_INCREF(naming)
        reply.thing = <PyObject*> naming
        p = self.reactor.gather.reserve(HEADER + name_size + body_size)
        p[0] = b"P"
        put32(p + 1, <uint32_t> (4 + name_size + body_size))
        memcpy(p + HEADER, PyBytes_AS_STRING(statement.server_name), name_size)
        memcpy(p + HEADER + name_size, PyBytes_AS_STRING(statement.body), body_size)
        return 0

    cdef int prepare_sql(self, Naming naming) except -1:
        """Run a PREPARE within a batch of the extended protocol."""
        cdef Statement statement = naming.after
        cdef Reply* reply
        cdef Py_ssize_t size = len(statement.body) + 1
        cdef char* p = self.reactor.gather.reserve(HEADER + 1 + size + 2)
        p[0] = b"P"
        put32(p + 1, <uint32_t> (4 + 1 + size + 2))
        p[HEADER] = 0
        memcpy(p + HEADER + 1, PyBytes_AS_STRING(statement.body), size)
        p[HEADER + 1 + size] = p[HEADER + 2 + size] = 0
        self.reactor.gather.copy(RUN_UNNAMED, len(RUN_UNNAMED))
        self.unnamed_serial = 0
        self.replies.push(ASKED_PARSE, REPLY_SKIP)
        self.replies.push(ASKED_BIND, REPLY_SKIP)
        reply = self.replies.push(ASKED_EXECUTE, REPLY_SKIP)
        Py_INCREF(naming)
        reply.thing = <PyObject*> naming
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
