"""One client in the steady state: its requests on their way to a server.

`process` walks the messages of one read; here tokens are taken and a server is
borrowed, or waited for. `_simple` and `_extended` add the two query protocols,
`_server` has the way back. What takes time or is rare (errors, waits, closing) is
asked of `host`, the engine's Relay.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.string cimport memset

from ogelproxy._fingerprint cimport (
    FLAG_ANY_SETTING, FLAG_DISCARD, FLAG_ROLE, FLAG_SET, FLAG_SET_CONFIG,
    FLAG_SET_LOCAL, FLAG_TRANSACTION,
)
from ogelproxy._flights cimport Flights
from ogelproxy._pool cimport MODE_SESSION
from ogelproxy._connection cimport Connection
from ogelproxy._reactor cimport HIGH_WATER, SCRATCH
from ogelproxy._replies cimport (
    ASKED_EXECUTE, ASKED_QUERY, MAX_OWED, REPLY_FAKE, REPLY_FORWARD, REPLY_REFUSE,
)
from ogelproxy._loan cimport Lendable
from ogelproxy._traffic cimport Traffic
from ogelproxy._usage cimport Attribution, Measure, UsageTable
from ogelproxy._wire cimport HEADER, MAX_MESSAGE, frame_size
from ogelproxy.errors import ProtocolViolation

# Both fail on the server, so that it ends up where any failed request leaves
# it: to its Sync in a batch, in a failed transaction inside a transaction. The
# error that it answers is replaced (Reply.thing).
cdef bytes FAILING_EXECUTE = b"E\0\0\0\x14o7s:refused\0\0\0\0\0"
cdef bytes FAILING_QUERY = b"Q\0\0\0\x10o7s:refused\0"


cdef enum:
    MAX_TOUCHED = 256  # names of settings kept; more than are followed


cdef object unknown_message(char kind):
    return ProtocolViolation(f"invalid frontend message type {<uint8_t> kind}")


cdef class ClientCore(Borrower):

    def start(
        self, host, PoolCore pool, Settings settings, TokenBucket bucket,
        Attribution who, UsageTable usage, Traffic traffic, Flights flights not None,
    ):
        """Leave the login: from here on compiled callbacks carry the client."""
        self.host = host
        self.pool = pool
        self.startup = self.settings = settings
        pool.clients_seen += 1
        self.serial = pool.clients_seen
        self.bucket = bucket
        self.who = who
        self.usage = usage
        self.traffic = traffic
        self.flights = flights
        self.prepare_names()
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
        return CLIENT_QUEUED <= self.phase <= CLIENT_HELD

    @property
    def is_crowded(self):
        return self.phase == CLIENT_CROWDED

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
            if self.phase == CLIENT_LINGER:
                got = self.receive(self.reactor.scratch, SCRATCH)
                return self.gone() if got < 0 else 0
            if self.is_reading() and not self.is_hung:
                # Its server, drained, had it read again: it still has to wait.
                return self.hold()
            return self.gone()
        if self.is_stalled or not self.is_reading():
            return self.gone() if self.is_hung else 0
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
            return 0
        if self.server is not None:
            self.server.resume()
        if self.is_stalled:
            self.unstall()
        return 0

    cdef int on_deferred(self) except -1:
        if self.phase == CLIENT_QUEUED:
            if self.server is None:
                return 0
            if self.is_broken:
                return self.gone()
            self.phase = CLIENT_READY
            self.queued += self.reactor.now - self.waiting_since
            self.waiting_since = 0
            self.begin_loan()
            self.resume()
            if self.in_size == 0:
                return self.flush_requests()
        if self.phase == CLIENT_READY and self.is_broken:
            # It left while its login was being finished.
            return self.gone()
        if self.phase == CLIENT_READY and self.in_size:
            self.process_inbox()
        if self.fd >= 0 and not self.is_waiting and (
            self.tls is not None or self.phase == CLIENT_LOGIN
        ):
            return self.on_readable()
        return 0

    cdef int unstall(self) except -1:
        """Read its requests again, if it took and was given enough answers."""
        if self.is_leaving or self.out_size > HIGH_WATER or (
            self.server is not None and self.server.replies.count >= MAX_OWED // 2
        ):
            return 0
        self.is_stalled = False
        self.resume()
        return self.reactor.later(self)

    cdef int process_inbox(self) except -1:
        cdef Py_ssize_t used = self.process(self.inbox, self.in_size)
        if self.fd >= 0:
            self.consume(min(used, self.in_size))
        return 0

    def retry(self):
        """End the wait for a token: try the query again."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.phase == CLIENT_HELD:
            self.bucket.leave(self)
            self.phase = CLIENT_READY
            self.resume()
            self.reactor.later(self)

    cdef int server_gone(self, bint may_tell) except -1:
        if may_tell:
            self.fail(self.host.server_lost_message)
            return 0
        return self.end(True)

    # Requests.

    cdef Py_ssize_t process(self, const char* p, Py_ssize_t n) except -1:
        """Handle the messages in `p`; return the bytes that were used."""
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t size
        cdef Py_ssize_t step
        self.active_at = self.reactor.now
        while i < n and self.phase == CLIENT_READY and not self.is_leaving:
            if self.body_left:
                step = self.stream(p + i, min(self.body_left, n - i))
                if step == 0:
                    break
                i += step
                continue
            if n - i < HEADER:
                break
            size = frame_size(p + i, MAX_MESSAGE)
            if size < 0:
                raise ProtocolViolation("impossible message length")
            if self.out_size > HIGH_WATER or (
                self.server is not None and self.server.replies.count >= MAX_OWED
            ):
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

    cdef int flush_rest(self) except -1:
        if self.server is not None and self.phase == CLIENT_READY:
            self.server.flush_gather()
        return 0

    cdef int flush_requests(self) except -1:
        cdef Lendable server = self.server
        cdef Reply* last
        if server is None:
            return 0 if self.phase == CLIENT_QUEUED else self.land()
        server.flush_gather()
        if server.out_size > HIGH_WATER and self.phase == CLIENT_READY:
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
        if kind == b"X":
            return self.leave(min(size, have))
        if self.is_dropping and kind != b"S":
            if kind not in b"BCDEFHPQcdf":
                raise unknown_message(kind)
            return self.drop(size, have)
        if kind == b"d" or kind == b"c" or kind == b"f":
            # Outside of COPY the server ignores them, so nothing is lost.
            if self.server is None:
                return self.drop(size, have)
            if kind != b"d":
                self.server.copy_ended()
            return self.forward(p, size, have)
        return self.request(kind, p, size, have)

    cdef Py_ssize_t leave(self, Py_ssize_t used) except -1:
        """Terminate: what was asked before is still answered."""
        cdef Lendable server = self.server
        if server is not None:
            server.flush_gather()
            if server.replies.count and not (
                self.is_batch_open or server.in_copy or self.body_left
            ):
                self.is_leaving = self.is_stalled = True
                self.hold()
                return used
        self.end(False)
        return used

    cdef int left(self) except -1:
        return self.end(True)

    cdef bytes renumbered(self, bytes notification):
        process_id = self.session.process_id.to_bytes(4, "big")
        return notification[:HEADER] + process_id + notification[HEADER + 4:]

    cdef int prepare_names(self) except -1:
        return 0

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        raise unknown_message(kind)

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

    cdef Py_ssize_t stream(self, const char* p, Py_ssize_t size) except -1:
        """Pass a large message's next part on; 0 when it has to wait, or was ended."""
        if not self.body_dropped and self.server is not None:
            if self.is_scanning and not self.scan_part(p, size):
                return 0
            self.reactor.gather.emit(p, size)
        self.body_left -= size
        return size

    cdef bint scan_part(self, const char* p, Py_ssize_t size) except -1:
        """See the next part of a query; whether it may be passed on."""
        return True

    # Tokens and servers.

    cdef int pay(self, uint32_t count) except -1:
        """Take tokens; when there are too few, wait or be refused."""
        cdef double wait
        cdef double end
        cdef Measure measure
        if self.granted:
            # It waited its turn, and they were taken for it.
            if self.granted == count:
                self.granted = 0
                self.waited()
                return PAID
            self.bucket.refund(self.granted)
            self.granted = 0
        # What is leased may have run out since this turn of the loop began.
        self.reactor.tick()
        wait = self.bucket.take(self.reactor.now, count) if count else 0.0
        if wait != 0 and self.bucket.must_ask:
            if self.asked_since == 0:
                self.asked_since = self.reactor.now
            self.line_up(count)
            return HELD
        if wait <= 0:
            if wait < 0:
                self.wait = -wait
                self.traffic.warned += 1
                self.notice = self.host.warning(self, count)
                if self.server is None or self.server.replies.count == 0:
                    self.write(PyBytes_AS_STRING(self.notice), len(self.notice))
                    self.notice = None
            self.waited()
            return PAID
        self.wait = wait
        end = self.wait_until(self.reactor.now)
        if self.reactor.now + wait <= end:
            if self.held_since == 0:
                self.held_since = self.asked_since or self.reactor.now
                self.traffic.delayed += 1
            self.line_up(count)
            return HELD
        memset(&measure, 0, sizeof(Measure))
        measure.refused = count
        if self.held_since:
            measure.throttled_seconds = self.reactor.now - self.held_since
        self.asked_since = self.held_since = 0
        self.traffic.refused += 1
        self.usage.count(self.who, &measure)
        return REFUSED

    cdef void waited(self) noexcept:
        if self.held_since:
            self.throttled += self.reactor.now - self.held_since
        self.asked_since = self.held_since = 0

    cdef int line_up(self, uint32_t count) except -1:
        """Wait in the queue of the bucket: for tokens, or to know of them."""
        cdef double left = self.wait_until(self.reactor.now) - self.reactor.now
        if left > 0:
            # Later than that it waits for an answer only, which says no or yes.
            self.timer = self.reactor.loop.call_later(left, self.retry)
        self.phase = CLIENT_HELD
        self.hold()
        self.bucket.join(self, count, self.reactor.now)
        return 0

    def wait_until(self, double now):
        """When its wait for tokens, which may begin now, has to end."""
        cdef double most = self.bucket.max_wait
        if self.server is not None and (
            self.server.status != b"I"
            # Or will be in one: a BEGIN is on its way.
            or self.server.replies.count and self.server.flags & FLAG_TRANSACTION
        ):
            most = self.host.transaction_wait
        return (self.held_since or self.asked_since or now) + most

    def grant(self, uint32_t count):
        """End the wait for tokens: they were taken for it."""
        if self.phase != CLIENT_HELD:
            self.bucket.refund(count)
            return
        self.granted = count
        self.retry()

    cdef bint borrow(self) except -1:
        """Have a server, or begin to wait for one."""
        cdef Lendable server
        if not self.is_flying and not self.flights.enter(self):
            self.phase = CLIENT_CROWDED
            self.waiting_since = self.reactor.now
            self.traffic.flight_waits += 1
            return False
        if self.server is not None:
            return True
        server = <Lendable> self.pool.take(self.settings)
        if server is None:
            # It is held only when it says more: most are served before they do.
            self.phase = CLIENT_QUEUED
            self.waiting_since = self.reactor.now
            self.pool.wait(self)
            return False
        server.lend(self)
        self.begin_loan()
        return True

    cdef int cleared(self) except -1:
        self.phase = CLIENT_READY
        self.queued += self.reactor.now - self.waiting_since
        self.waiting_since = 0
        self.resume()
        return self.reactor.later(self)

    cdef int begin_loan(self) except -1:
        cdef Lendable server = self.server
        if server.settings is not self.settings:
            server.ask_query(self.pool.switch(server.settings, self.settings))
            server.settings = self.settings
        return 0

    cdef int note(self, uint32_t flags, bytes text) except -1:
        """Note what session state a statement may make or end.

        `text` is None when it is too long to be read.
        """
        cdef bint sets = flags & (FLAG_SET | FLAG_SET_CONFIG | FLAG_ROLE) != 0
        if sets or flags & FLAG_DISCARD and self.pool.mode != MODE_SESSION:
            names = None if text is None else self.pool.settings_changed(text)
            if sets and self.startup.restore is not None and (
                text is None or self.pool.may_reset(text)
            ):
                # SET .. TO DEFAULT: looked at when it is answered.
                self.server.was_reset = True
            if names is None:
                flags |= FLAG_ANY_SETTING
            elif names:
                if self.touched is None:
                    self.touched = names
                elif len(self.touched) < MAX_TOUCHED:
                    self.touched |= names
            elif sets:
                # Until the transaction ends only.
                flags &= ~<uint32_t> (FLAG_SET | FLAG_SET_CONFIG | FLAG_ROLE)
                flags |= FLAG_SET_LOCAL
        self.server.flags |= flags
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

    # Endings.

    def give_up(self, bytes error):
        """Answer the query that waits for a server or a token with an error."""
        cdef char kind
        if not self.is_waiting or self.in_size < HEADER or self.body_left:
            return  # half-way in a message it can't be told
        if self.phase == CLIENT_QUEUED and self.server is not None:
            return
        self.detach_wait()
        self.phase = CLIENT_READY
        self.waiting_since = self.asked_since = self.held_since = 0
        self.bucket.refund(self.prepaid)
        self.prepaid = 0
        kind = self.inbox[0]
        self.reactor.gather.clear()
        self.refuse(kind, error)
        if kind == b"Q" or kind == b"F":
            self.consume(self.drop(frame_size(self.inbox, MAX_MESSAGE), self.in_size))
        self.flush_requests()
        self.resume()
        self.reactor.later(self)

    cdef int detach_wait(self) except -1:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.phase == CLIENT_QUEUED:
            self.pool.forget(self)
        elif self.phase == CLIENT_CROWDED:
            self.flights.forget(self)
        elif self.phase == CLIENT_HELD:
            self.bucket.leave(self)
        if self.granted:
            self.bucket.refund(self.granted)
            self.granted = 0
        return 0

    def fail(self, bytes message):
        """Tell the client why, then end its connection."""
        cdef bint at_boundary = self.server is None or self.server.body_left == 0
        if self.fd < 0 or self.phase >= CLIENT_LINGER:
            return
        self.reactor.gather.clear()
        self.detach()
        if at_boundary:
            self.write(PyBytes_AS_STRING(message), len(message))
        self.end(True)

    cdef int detach(self) except -1:
        """Leave whatever it waits for or holds."""
        self.detach_wait()
        if self.server is not None:
            self.server.drop_client()
        return self.land()

    cdef int end(self, bint lingers) except -1:
        """Close; after an error only when the client had time to read it.

        Closing at once with requests unread would reset the connection, and
        the error with it.
        """
        cdef bint was_counted = self.phase != CLIENT_LINGER
        self.reactor.gather.clear()
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
        if self.is_leaving and self.server is not None:
            self.server.finish_alone()
        return self.end(False)

    def abort(self):
        """Close at once."""
        if self.fd >= 0:
            self.gone()
