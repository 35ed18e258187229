"""The steady state: one client's requests on their way to a server.

`process` walks the messages of one read, takes tokens, borrows a server,
renames prepared statements where the pool shares them, and notes what reply is
owed for each message. `_server` has the way back. What takes time or is rare
(errors, waits, closing) is asked of `host`, the engine's Relay.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF
from cpython.object cimport PyObject
from libc.string cimport memchr, memcmp, memcpy, memset

from ogelproxy._bucket cimport MODE_OFF
from ogelproxy._fingerprint cimport scan_feed, scan_finish, scan_start
from ogelproxy._pool cimport MODE_SESSION
from ogelproxy._reactor cimport HIGH_WATER, SCRATCH, Connection, Reactor
from ogelproxy._replies cimport (
    ASKED_BIND,
    ASKED_CLOSE,
    ASKED_DESCRIBE,
    ASKED_EXECUTE,
    ASKED_FUNCTION,
    ASKED_PARSE,
    ASKED_QUERY,
    ASKED_SYNC,
    MAX_OWED,
    REPLY_FAKE,
    REPLY_FORWARD,
    REPLY_REFUSE,
    REPLY_SKIP,
)
from ogelproxy._server cimport Latency, ServerCore
from ogelproxy._statements cimport describe
from ogelproxy._usage cimport Attribution, Measure, UsageTable
from ogelproxy._wire cimport HEADER, MAX_MESSAGE, MAX_SEEN, Gather, frame_size, put32
from ogelproxy.errors import ProtocolViolation, QueryTooLarge

cdef enum:  # what pay() answers
    PAID
    HELD      # the client waits; the message is handled again afterwards
    REFUSED

cdef enum:
    NAMES_SEEN = 4096       # bytes of a Bind that must be there to be forwarded
    MAX_NAMES = 5000        # prepared statements of one client
    MAX_PORTALS = 1000      # named portals of one transaction whose text is known
    MAX_SHARED = 16         # times its bytes that a pool's statements may take
    FUNCTION_CALL = 1       # the fingerprint of every function call message

# Both fail on the server, so that it ends up where any failed request leaves
# it: to its Sync in a batch, in a failed transaction inside a transaction. The
# error that it answers is replaced (Reply.thing).
cdef bytes FAILING_EXECUTE = b"E\0\0\0\x14o7s:refused\0\0\0\0\0"
cdef bytes FAILING_QUERY = b"Q\0\0\0\x10o7s:refused\0"


cdef class ClientCore(Borrower):

    def start(
        self, host, PoolCore pool, Settings settings, TokenBucket bucket,
        Attribution who, UsageTable usage, Latency latency,
    ):
        """Leave the login: from here on compiled callbacks carry the client."""
        self.host = host
        self.pool = pool
        self.settings = settings
        self.bucket = bucket
        self.who = who
        self.usage = usage
        self.latency = latency
        self.shares_names = pool.mode != MODE_SESSION
        self.names = {}
        self.portals = {}
        self.phase = CLIENT_READY
        self.active_at = self.reactor.now
        self.resume()
        self.reactor.later(self)

    @property
    def is_idle(self):
        """Whether nothing of it would be lost by ending it now."""
        return self.in_size == 0 and self.phase == CLIENT_READY and (
            self.server is None or self.server.is_settled()
        )

    @property
    def is_in_transaction(self):
        return self.server is not None and self.server.status != b"I"

    @property
    def is_waiting(self):
        return self.phase == CLIENT_QUEUED or self.phase == CLIENT_HELD

    @property
    def is_lingering(self):
        return self.phase == CLIENT_LINGER

    @property
    def is_logging_in(self):
        return self.phase == CLIENT_LOGIN

    # Events.

    cdef int on_readable(self) except -1:
        cdef Py_ssize_t got
        cdef Py_ssize_t used
        if self.phase == CLIENT_LOGIN:
            return Connection.on_readable(self)
        if self.phase != CLIENT_READY:
            # Waiting, only a hang-up is heard of; lingering, all is thrown away.
            got = self.receive(self.reactor.scratch, SCRATCH)\
                if self.phase == CLIENT_LINGER else -1
            return self.gone() if got < 0 else 0
        if self.is_stalled or not self.is_reading():
            return 0
        if self.in_size == 0:
            got = self.receive(self.reactor.scratch, SCRATCH)
            if got <= 0:
                return self.gone() if got < 0 else 0
            used = self.process(self.reactor.scratch, got)
            if used < got and self.fd >= 0 and self.phase != CLIENT_LINGER:
                self.keep(self.reactor.scratch + used, got - used)
            return 0
        got = self.fill(SCRATCH)
        if got <= 0:
            return self.gone() if got < 0 else 0
        return self.process_inbox()

    cdef int on_drained(self) except -1:
        if self.phase == CLIENT_LINGER:
            self.end_output()
        elif self.server is not None:
            self.server.resume()
        return 0

    cdef int on_deferred(self) except -1:
        if self.phase == CLIENT_QUEUED:
            if self.server is None:
                return 0
            self.phase = CLIENT_READY
            self.queued += self.reactor.now - self.waiting_since
            self.waiting_since = 0
            self.begin_loan()
            self.resume()
            if self.in_size == 0:
                return self.flush_requests()
        if self.phase == CLIENT_READY and self.in_size:
            return self.process_inbox()
        if self.tls is not None or self.phase == CLIENT_LOGIN:
            return self.on_readable()
        return 0

    cdef int process_inbox(self) except -1:
        cdef Py_ssize_t used = self.process(self.inbox, self.in_size)
        if self.fd >= 0:
            self.consume(min(used, self.in_size))
        return 0

    def retry(self):
        """End the wait for a token: try the query again."""
        self.timer = None
        if self.phase == CLIENT_HELD:
            self.phase = CLIENT_READY
            self.resume()
            self.reactor.later(self)

    cdef int server_released(self) except -1:
        if self.portals:
            self.portals.clear()
        return 0

    cdef int server_gone(self, bint may_tell) except -1:
        if may_tell:
            self.fail(self.host.server_lost_message)
            return 0
        return self.end(True)

    cdef int parse_failed(self, Statement statement) except -1:
        for name, each in self.names.items():
            if each is statement:
                del self.names[name]
                break
        return 0

    # Requests.

    cdef Py_ssize_t process(self, const char* p, Py_ssize_t n) except -1:
        """Handle the messages in `p`; return the bytes that were used."""
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t size
        cdef Py_ssize_t step
        self.active_at = self.reactor.now
        while i < n and self.phase == CLIENT_READY:
            if self.body_left:
                step = min(self.body_left, n - i)
                self.stream(p + i, step)
                i += step
                continue
            if n - i < HEADER:
                break
            size = frame_size(p + i, MAX_MESSAGE)
            if size < 0:
                raise ProtocolViolation("impossible message length")
            if self.server is not None and self.server.replies.count >= MAX_OWED:
                self.is_stalled = True
                self.pause()
                break
            step = self.message(p[i], p + i, size, n - i)
            if step == 0:
                break
            i += step
        if self.phase <= CLIENT_HELD:
            self.flush_requests()
        return i

    cdef int flush_requests(self) except -1:
        cdef ServerCore server = self.server
        cdef Reply* last
        if server is None:
            return 0
        server.flush_gather()
        if server.out_size > HIGH_WATER:
            self.pause()
        last = server.replies.last()
        if last == NULL:
            if server.is_settled():
                server.release()
        elif last.action == REPLY_FAKE:
            server.fakes()
            self.flush_gather()
        return 0

    cdef Py_ssize_t message(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        """Handle one message, of which `have` bytes are there.

        Returns the bytes used: 0 when more must come or the client has to wait.
        """
        cdef Py_ssize_t needed = size
        if kind == b"X":
            self.end(False)
            return min(size, have)
        if self.is_dropping and kind != b"S":
            return self.drop(size, have)
        if kind == b"d" or kind == b"c" or kind == b"f":
            # Outside of COPY the server ignores them, so nothing is lost.
            if self.server is None:
                return self.drop(size, have)
            return self.forward(p, size, have)
        if kind == b"Q":
            return self.on_query(p, size, have)
        if kind == b"F":
            return self.on_function(p, size, have)
        if kind not in b"PBDECSH":
            raise ProtocolViolation(f"unexpected message {bytes([kind])!r}")
        if kind == b"B":
            needed = min(size, <Py_ssize_t> NAMES_SEEN)
        elif size > MAX_SEEN and kind == b"P":
            needed = NAMES_SEEN
        elif size > MAX_SEEN:
            raise ProtocolViolation("message is too long")
        if have < needed:
            return 0
        have = min(have, size)
        if kind == b"S":
            return self.on_sync(p, size)
        if kind == b"H":
            return self.forward(p, size, have) if self.server is not None else size
        if not self.is_batch_open:
            self.begin_batch(kind, p, have)
            if self.phase != CLIENT_READY:
                return 0
            if self.is_dropping:
                return self.drop(size, have)
        if not self.borrow():
            return 0
        self.is_batch_open = True
        if kind == b"P":
            return self.on_parse(p, size, have)
        if kind == b"B":
            return self.on_bind(p, size, have)
        if kind == b"E":
            return self.on_execute(p, size)
        if kind == b"D":
            return self.on_describe(p, size)
        return self.on_close(p, size)

    cdef Py_ssize_t forward(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        have = min(size, have)
        self.reactor.gather.emit(p, have)
        self.body_left = size - have
        self.body_dropped = False
        return have

    cdef Py_ssize_t drop(self, Py_ssize_t size, Py_ssize_t have) noexcept:
        have = min(size, have)
        self.body_left = size - have
        self.body_dropped = True
        return have

    cdef int stream(self, const char* p, Py_ssize_t size) except -1:
        """Pass on the next part of a message that is larger than one read."""
        cdef uint32_t cost
        cdef Reply* reply
        self.body_left -= size
        if self.body_dropped or self.server is None:
            return 0
        if self.is_scanning:
            # The server runs nothing before the last byte, so that a statement
            # found late can still be refused: with the connection.
            scan_feed(&self.scan, p, size if self.body_left else size - 1)
            if self.body_left == 0:
                self.is_scanning = False
                scan_finish(&self.scan)
                reply = self.server.replies.at(
                    self.scanned_index - self.server.replies.first
                )
                reply.fingerprint = self.scan.fingerprint
                reply.complexity = self.scan.complexity
                reply.queries = max(self.scan.statements, 1)
                self.server.flags |= self.scan.flags
            cost = self.scan.statements - self.scan.free_statements
            if cost > self.scan_paid:
                if self.bucket.take(self.reactor.now, cost - self.scan_paid) > 0:
                    self.reactor.gather.clear()
                    self.fail(self.host.refusal(self, cost, True))
                    return 0
                self.scan_paid = cost
        return self.reactor.gather.emit(p, size)

    # Tokens and servers.

    cdef int pay(self, uint32_t count) except -1:
        """Take tokens; when there are too few, wait or be refused."""
        cdef double now = self.reactor.now
        cdef double wait = self.bucket.take(now, count) if count else 0.0
        cdef double most
        cdef Measure measure
        self.wait = wait
        if wait <= 0:
            if wait < 0:
                self.wait = -wait
                self.notice = self.host.warning(self, count)
                if self.server is None or self.server.replies.count == 0:
                    self.write(PyBytes_AS_STRING(self.notice), len(self.notice))
                    self.notice = None
            if self.held_since:
                self.throttled += now - self.held_since
                self.held_since = 0
            return PAID
        most = self.bucket.max_wait
        if self.server is not None and self.server.status != b"I":
            most = self.host.transaction_wait
        if self.held_since == 0:
            self.held_since = now
        if now + wait <= self.held_since + most:
            self.phase = CLIENT_HELD
            self.hold()
            self.timer = self.reactor.loop.call_later(wait, self.retry)
            return HELD
        memset(&measure, 0, sizeof(Measure))
        measure.refused = count
        measure.throttled_seconds = now - self.held_since
        self.held_since = 0
        self.usage.count(self.who, &measure)
        return REFUSED

    cdef bint borrow(self) except -1:
        """Have a server, or begin to wait for one."""
        cdef ServerCore server
        if self.server is not None:
            return True
        server = <ServerCore> self.pool.take()
        if server is None:
            self.phase = CLIENT_QUEUED
            self.waiting_since = self.reactor.now
            self.hold()
            self.pool.wait(self)
            return False
        server.lend(self)
        self.begin_loan()
        return True

    cdef int begin_loan(self) except -1:
        cdef ServerCore server = self.server
        if server.settings is not self.settings:
            server.ask_query(self.pool.switch(server.settings, self.settings))
            server.settings = self.settings
        return 0

    cdef Reply* ask(self, uint8_t asked, Py_ssize_t size) except NULL:
        """Note that a reply is owed for a message of `size` bytes."""
        cdef Reply* reply = self.server.replies.push(asked, REPLY_FORWARD)
        reply.bytes_in = size
        reply.started = self.reactor.now
        if self.queued or self.throttled:
            reply.queued = self.queued
            reply.throttled = self.throttled
            self.queued = self.throttled = 0
        return reply

    cdef int refuse(self, char kind, bytes error) except -1:
        """Answer a request with an error, in its turn, the way Postgres would."""
        cdef bytes failing
        cdef Reply* reply
        if self.server is None or not self.is_batch_open and self.server.is_settled():
            self.write(PyBytes_AS_STRING(error), len(error))
            if kind == b"Q" or kind == b"F":
                self.write(b"Z\0\0\0\x05I", 6)
            else:
                self.is_dropping = True
                self.answers_sync = True
            return 0
        if kind == b"Q" or kind == b"F":
            failing = FAILING_QUERY
            reply = self.server.replies.push(ASKED_QUERY, REPLY_REFUSE)
        else:
            failing = FAILING_EXECUTE
            reply = self.server.replies.push(ASKED_EXECUTE, REPLY_REFUSE)
            self.is_dropping = True
        Py_INCREF(error)
        reply.thing = <PyObject*> error
        return self.reactor.gather.copy(PyBytes_AS_STRING(failing), len(failing))

    # The simple protocol.

    cdef Py_ssize_t on_query(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef bint is_whole = size <= have
        cdef uint32_t cost
        cdef int verdict
        cdef Reply* reply
        if not is_whole and size <= MAX_SEEN:
            return 0
        scan_start(&self.scan)
        if is_whole:
            scan_feed(&self.scan, p + HEADER, max(size - HEADER - 1, 0))
            scan_finish(&self.scan)
            cost = self.scan.statements - self.scan.free_statements
            if self.scan.statements == 0:
                cost = 1
        else:
            scan_feed(&self.scan, p + HEADER, have - HEADER)
            cost = max(self.scan.statements - self.scan.free_statements, 1)
        if not self.prepaid:
            verdict = self.pay(cost)
            if verdict == HELD:
                return 0
            if verdict == REFUSED:
                self.refuse(b"Q", self.host.refusal(self, cost, False))
                return self.drop(size, have)
            self.prepaid = cost
        if not self.borrow():
            return 0
        self.prepaid = 0
        reply = self.ask(ASKED_QUERY, size)
        if is_whole:
            reply.fingerprint = self.scan.fingerprint
            reply.complexity = self.scan.complexity
            reply.queries = max(self.scan.statements, 1)
            self.server.flags |= self.scan.flags
        else:
            reply.queries = 1
            reply.complexity = 100
            self.is_scanning = True
            self.scan_paid = cost
            self.scanned_index = (
                self.server.replies.first + self.server.replies.count - 1
            )
        self.unnamed = None
        return self.forward(p, size, have)

    cdef Py_ssize_t on_function(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef int verdict
        cdef Reply* reply
        if not self.prepaid:
            verdict = self.pay(1)
            if verdict == HELD:
                return 0
            if verdict == REFUSED:
                self.refuse(b"F", self.host.refusal(self, 1, False))
                return self.drop(size, have)
            self.prepaid = 1
        if not self.borrow():
            return 0
        self.prepaid = 0
        reply = self.ask(ASKED_FUNCTION, size)
        reply.queries = 1
        reply.complexity = 100
        reply.fingerprint = FUNCTION_CALL
        return self.forward(p, size, have)

    # The extended protocol.

    cdef int begin_batch(self, char kind, const char* p, Py_ssize_t n) except -1:
        """Pay for a batch's first query while it holds no server.

        So a client that has to wait blocks nobody, and one that is refused
        costs the server nothing.
        """
        cdef int verdict
        if (
            self.prepaid
            or self.bucket.mode == MODE_OFF
            or self.server is not None and not self.server.is_settled()
            or not self.batch_executes(p, n)
        ):
            return 0
        verdict = self.pay(1)
        if verdict == PAID:
            self.prepaid = 1
        elif verdict == REFUSED:
            self.refuse(kind, self.host.refusal(self, 1, False))
        return 0

    cdef bint batch_executes(self, const char* p, Py_ssize_t n) except -1:
        """Whether the batch's first Execute can be seen and costs a token."""
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t size
        while n - i >= HEADER:
            size = frame_size(p + i, MAX_MESSAGE)
            if size < 0 or p[i] == b"S" or p[i] == b"Q":
                return False
            if p[i] == b"E":
                return True
            if p[i] == b"P" or p[i] == b"B":
                # What may turn out to be a COMMIT is looked at when it runs.
                if (
                    self.bucket.level < 1
                    and size <= n - i
                    and memchr(p + i + HEADER, 0, size - HEADER) != NULL
                    and self.may_be_free(p + i, size)
                ):
                    return False
            i += size
        return False

    cdef bint may_be_free(self, const char* p, Py_ssize_t size) except -1:
        cdef const char* end = p + size
        cdef const char* name = p + HEADER
        cdef const char* stop = <const char*> memchr(name, 0, end - name)
        cdef Statement statement
        if p[0] == b"P":
            return describe(stop[1:end - stop]).is_free
        name = stop + 1
        stop = <const char*> memchr(name, 0, end - name)
        if stop == NULL:
            return False
        statement = self.names.get(name[:stop - name]) if stop > name else self.unnamed
        return statement is not None and statement.is_free

    cdef Statement use_statement(self, char kind, const char* name, Py_ssize_t size):
        """Make sure that the server has the statement of this name.

        Returns None when the client has none: it was then answered so.
        """
        cdef ServerCore server = self.server
        cdef Statement statement
        cdef Reply* reply
        if size == 0:
            statement = self.unnamed
            if statement is not None:
                if server.unnamed_serial == self.unnamed_serial:
                    return statement
                if statement.body is not None:
                    server.unnamed_serial = self.unnamed_serial
                    reply = server.replies.push(ASKED_PARSE, REPLY_SKIP)
                    reply.closes_unnamed = 1
                    self.emit_renamed(
                        b"P", NULL, 0, None, PyBytes_AS_STRING(statement.body),
                        len(statement.body), 0,
                    )
                    return statement
        else:
            statement = self.names.get(name[:size])
            if statement is not None:
                self.pool.statements.tick += 1
                statement.last_used = self.pool.statements.tick
                if statement not in server.prepared:
                    server.prepare(statement, REPLY_SKIP)
                return statement
        self.refuse(kind, self.host.statement_unknown(name[:size]))
        return None

    cdef int emit_renamed(
        self, char kind, const char* before, Py_ssize_t before_size,
        Statement statement, const char* after, Py_ssize_t after_size, Py_ssize_t unseen
    ) except -1:
        """Send a message with the server's name for a statement in it.

        `unseen` counts the bytes of it that are still to come.
        """
        cdef Py_ssize_t name_size = 1
        cdef char* p
        if statement is not None:
            name_size += len(statement.server_name)
        p = self.reactor.gather.reserve(HEADER + before_size + name_size + after_size)
        p[0] = kind
        put32(p + 1, <uint32_t> (4 + before_size + name_size + after_size + unseen))
        p += HEADER
        memcpy(p, before, before_size)
        p += before_size
        if statement is None:
            p[0] = 0
        else:
            memcpy(p, PyBytes_AS_STRING(statement.server_name), name_size)
        memcpy(p + name_size, after, after_size)
        return 0

    cdef Py_ssize_t on_parse(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef const char* name = p + HEADER
        cdef const char* body = <const char*> memchr(name, 0, have - HEADER)
        cdef Py_ssize_t body_size
        cdef Statement statement
        cdef Reply* reply
        if body == NULL:
            raise ProtocolViolation("statement name is not terminated")
        body += 1
        body_size = p + have - body
        if body - name > 1 and self.shares_names:
            key = name[:body - name - 1]
            if key in self.names:
                self.refuse(b"P", self.host.statement_exists(key))
                return self.drop(size, have)
            if (
                size > have
                or len(self.names) >= MAX_NAMES
                or self.pool.statements.bytes_kept
                > MAX_SHARED * self.pool.statements.max_bytes
            ):
                self.refuse(b"P", self.host.error(QueryTooLarge(
                    hint="close prepared statements that are no longer used"
                )))
                return self.drop(size, have)
            statement = self.pool.statements.find(body, body_size)
            self.names[key] = statement
            self.pool.statements.tick += 1
            statement.last_used = self.pool.statements.tick
            if statement in self.server.prepared:
                self.server.replies.push(ASKED_PARSE, REPLY_FAKE)
            else:
                self.server.prepare(statement, REPLY_FORWARD)
            return size
        reply = self.ask(ASKED_PARSE, size)
        if body - name == 1:
            statement = self.unnamed
            if (
                statement is None
                or statement.body is None
                or len(statement.body) != body_size
                or memcmp(PyBytes_AS_STRING(statement.body), body, body_size) != 0
            ):
                statement = describe(PyBytes_FromStringAndSize(body, body_size))
                if size > have:
                    statement.body = None
                self.unnamed = statement
            reply.closes_unnamed = 1
            self.pool.statements.tick += 1
            self.unnamed_serial = self.pool.statements.tick
            self.server.unnamed_serial = self.unnamed_serial
        elif len(self.names) < MAX_NAMES:
            self.names[name[:body - name - 1]] = describe(
                PyBytes_FromStringAndSize(body, body_size)
            )
        return self.forward(p, size, have)

    cdef Py_ssize_t on_bind(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef const char* end = p + have
        cdef const char* portal = p + HEADER
        cdef const char* name = <const char*> memchr(portal, 0, have - HEADER)
        cdef const char* rest
        cdef Statement statement
        if name != NULL:
            name += 1
            rest = <const char*> memchr(name, 0, end - name)
        if name == NULL or rest == NULL:
            raise ProtocolViolation("portal or statement name is not terminated")
        if self.shares_names:
            statement = self.use_statement(b"B", name, rest - name)
            if statement is None:
                return self.drop(size, have)
        elif rest == name:
            statement = self.unnamed
        else:
            statement = self.names.get(name[:rest - name])
        if name - portal == 1:
            self.portal = statement
        elif len(self.portals) < MAX_PORTALS:
            self.portals[portal[:name - portal - 1]] = statement
        self.ask(ASKED_BIND, size)
        if not self.shares_names or rest == name:
            return self.forward(p, size, have)
        self.emit_renamed(
            b"B", portal, name - portal, statement, rest + 1, end - rest - 1,
            size - have,
        )
        self.body_left = size - have
        self.body_dropped = False
        return have

    cdef Py_ssize_t on_execute(self, const char* p, Py_ssize_t size) except -1:
        cdef Statement statement = self.portal
        cdef Reply* reply
        cdef int verdict = PAID
        cdef bint is_free
        if size < HEADER + 5:
            raise ProtocolViolation("Execute is too short")
        if p[HEADER] != 0:
            statement = self.portals.get(p[HEADER:size - 5]) if self.portals else None
        is_free = statement is not None and statement.is_free
        if self.prepaid:
            if is_free:
                self.bucket.refund(self.prepaid)
            self.prepaid = 0
        elif not is_free:
            verdict = self.pay(1)
        if verdict == HELD:
            return 0
        if verdict == REFUSED:
            self.refuse(b"E", self.host.refusal(self, 1, False))
            return size
        reply = self.ask(ASKED_EXECUTE, size)
        reply.queries = 1
        if statement is not None:
            reply.fingerprint = statement.fingerprint
            reply.complexity = statement.complexity
            self.server.flags |= statement.flags
        else:
            reply.complexity = 100
        self.reactor.gather.emit(p, size)
        return size

    cdef Py_ssize_t on_describe(self, const char* p, Py_ssize_t size) except -1:
        cdef Statement statement
        if size < HEADER + 2 or p[size - 1] != 0:
            raise ProtocolViolation("Describe is malformed")
        if self.shares_names and p[HEADER] == b"S":
            statement = self.use_statement(b"D", p + HEADER + 1, size - HEADER - 2)
            if statement is None:
                return size
            if size > HEADER + 2:
                self.ask(ASKED_DESCRIBE, size)
                self.emit_renamed(b"D", p + HEADER, 1, statement, NULL, 0, 0)
                return size
        self.ask(ASKED_DESCRIBE, size)
        self.reactor.gather.emit(p, size)
        return size

    cdef Py_ssize_t on_close(self, const char* p, Py_ssize_t size) except -1:
        if size < HEADER + 2 or p[size - 1] != 0:
            raise ProtocolViolation("Close is malformed")
        name = p[HEADER + 1:size - 1]
        if p[HEADER] == b"P":
            self.portals.pop(name, None)
        elif not name:
            self.unnamed = None
        else:
            self.names.pop(name, None)
            if self.shares_names:
                # Others may use the statement: it stays on the server.
                self.server.replies.push(ASKED_CLOSE, REPLY_FAKE)
                return size
        self.ask(ASKED_CLOSE, size)
        self.reactor.gather.emit(p, size)
        return size

    cdef Py_ssize_t on_sync(self, const char* p, Py_ssize_t size) except -1:
        self.is_dropping = False
        if self.prepaid:
            self.bucket.refund(self.prepaid)
            self.prepaid = 0
        if self.answers_sync:
            self.answers_sync = False
            self.write(b"Z\0\0\0\x05I", 6)
            return size
        if not self.borrow():
            return 0
        self.is_batch_open = False
        self.ask(ASKED_SYNC, size)
        self.reactor.gather.emit(p, size)
        return size

    # Endings.

    def give_up(self, bytes error):
        """Answer the query that waits for a server with an error instead."""
        if self.phase != CLIENT_QUEUED or self.server is not None:
            return
        self.pool.forget(self)
        self.phase = CLIENT_READY
        self.waiting_since = 0
        self.prepaid = 0
        self.refuse(self.inbox[0], error)
        if self.inbox[0] == b"Q" or self.inbox[0] == b"F":
            self.consume(
                self.drop(frame_size(self.inbox, MAX_MESSAGE), self.in_size)
            )
        self.resume()
        self.reactor.later(self)

    def fail(self, bytes message):
        """Tell the client why, then end its connection."""
        cdef bint at_boundary = self.server is None or self.server.body_left == 0
        if self.fd < 0 or self.phase >= CLIENT_LINGER:
            return
        self.detach()
        if at_boundary:
            self.write(PyBytes_AS_STRING(message), len(message))
        self.end(True)

    cdef int detach(self) except -1:
        """Leave whatever it waits for or holds."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.phase == CLIENT_QUEUED:
            self.pool.forget(self)
        if self.server is not None:
            self.server.drop_client()
        return 0

    cdef int end(self, bint lingers) except -1:
        """Close; after an error only when the client had time to read it.

        Closing at once with requests unread would reset the connection, and
        the error with it.
        """
        cdef bint was_counted = self.phase != CLIENT_LINGER
        self.detach()
        if lingers and not self.is_broken and was_counted:
            self.phase = CLIENT_LINGER
            self.body_left = 0
            self.active_at = self.reactor.now
            self.resume()
            if self.out_size == 0:
                self.end_output()
        else:
            self.phase = CLIENT_CLOSED
            self.shut()
        if was_counted:
            self.host.client_closed(self)
        return 0

    cdef int gone(self) except -1:
        self.is_broken = True
        return self.end(False)

    def abort(self):
        """Close at once."""
        if self.fd >= 0:
            self.gone()
