"""LISTEN and UNLISTEN without a server of the client's own, and what they bring.

In every mode but session a client's LISTEN, outside of a transaction, is a matter
between the proxy and the one connection that listens for all clients of a target
(`listen`). Here is its place among the client's other requests, and the moments at
which a notification may be written: between transactions, as with Postgres.
"""

from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING
from libc.string cimport memchr, memset
from posix.strings cimport strncasecmp

from ogelproxy._client cimport (
    CLIENT_HELD, CLIENT_LINGER, CLIENT_LOGIN, HELD, REFUSED,
)
from ogelproxy._fingerprint cimport scan_feed, scan_finish, scan_start
from ogelproxy._pool cimport MODE_SESSION
from ogelproxy._reactor cimport HIGH_WATER
from ogelproxy._usage cimport Measure
from ogelproxy._views cimport ANSWERED, DELAYED, PASSED
from ogelproxy._wire cimport HEADER, MAX_SEEN


cdef inline bint is_listen(const char* text, Py_ssize_t size) noexcept nogil:
    while size and text[0] in b" \t\r\n\f\v":
        text += 1
        size -= 1
    if size == 0 or text[0] not in b"LlUu":
        return False
    if size > 2 and text[0] in b"Uu":
        if strncasecmp(text, "un", 2) != 0:
            return False
        text += 2
        size -= 2
    return size > 6 and strncasecmp(text, "listen", 6) == 0


cdef class ListenClient(ViewClient):

    # Requests.

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef int verdict
        if self.concerns_channels(kind, p, size, min(size, have)):
            verdict = self.on_listen(kind, p, size) if size <= have else DELAYED
            if verdict != PASSED:
                return size if verdict == ANSWERED else 0
        if self.is_listening and size <= min(have, MAX_SEEN) and (
            kind == b"Q" or kind == b"P"
        ):
            self.pool.channels.forget(self, p[HEADER:size - 1])
        return ViewClient.request(self, kind, p, size, have)

    cdef bint concerns_channels(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) noexcept:
        cdef const char* text
        if self.pool.mode == MODE_SESSION or size > MAX_SEEN:
            return False
        if kind == b"Q":
            return is_listen(p + HEADER, have - HEADER)
        if kind == b"P":
            text = <const char*> memchr(p + HEADER, 0, have - HEADER)
            if text != NULL and is_listen(text + 1, p + have - text - 1):
                return True
        return self.listens is not None and kind in b"PBDEC"

    cdef int on_listen(self, char kind, const char* p, Py_ssize_t size) except -1:
        """Handle a message that may be about a channel."""
        cdef bytes body = p[HEADER:size]
        cdef bytes answer
        cdef bytes objection
        self.waits_to_listen = False
        cdef bint in_transaction
        if self.listens is None:
            self.listens = self.pool.channels.open(self)
            self.has_listened = True
        if not self.listens.takes(chr(kind), body):
            if not self.listens:
                self.listens = None
            return PASSED
        if self.answers_first():
            return DELAYED
        if self.server is not None and self.server.status == b"E":
            # The server refuses it, as it does all else.
            return PASSED
        in_transaction = self.is_batch_open or (
            self.server is not None and self.server.status == b"T"
        )
        objection = self.listens.objection(chr(kind), body, in_transaction)
        if objection is not None:
            self.refuse(kind, objection)
            return ANSWERED
        if self.listens.passes(
            chr(kind), body, self.server is not None, in_transaction
        ):
            return PASSED
        if kind == b"Q" or kind == b"E":
            return self.run_listen(kind, body, p, size)
        answer = self.listens.answer(chr(kind), body)
        if answer[0] == b"E":
            self.refuse(kind, answer)
        else:
            self.was_answered = True
            self.send(answer)
        return ANSWERED

    cdef int run_listen(
        self, char kind, bytes body, const char* p, Py_ssize_t size
    ) except -1:
        """Run a statement on a channel: it costs a token and counts as a query."""
        cdef int verdict
        if not self.prepaid:
            verdict = self.pay(1)
            if verdict == HELD:
                return DELAYED
            if verdict == REFUSED:
                self.refuse(kind, self.host.refusal(self, 1, False))
                return ANSWERED
            self.prepaid = 1
        answer = self.listens.answer(chr(kind), body)
        if answer is None:
            # Until the shared connection listens, and tries again.
            self.waits_to_listen = True
            self.phase = CLIENT_HELD
            self.hold()
            return DELAYED
        self.prepaid = 0
        if answer[0] == b"E":
            self.bucket.refund(1)
            self.refuse(kind, answer)
            return ANSWERED
        self.count_listen(self.listens.text(chr(kind), body), size, len(answer))
        if kind == b"Q":
            self.was_answered = False
            answer += self.ready()
        else:
            self.was_answered = True
        self.send(answer)
        return ANSWERED

    cdef int detach_wait(self) except -1:
        self.waits_to_listen = False
        return ViewClient.detach_wait(self)

    @property
    def encoding(self):
        """The client_encoding that it asked for, or None."""
        return dict(self.settings.items).get("client_encoding")

    cdef int count_listen(
        self, bytes text, Py_ssize_t size, Py_ssize_t size_out
    ) except -1:
        cdef Measure measure
        memset(&measure, 0, sizeof(Measure))
        scan_start(&self.scan)
        scan_feed(&self.scan, PyBytes_AS_STRING(text), len(text))
        scan_finish(&self.scan)
        measure.fingerprint = self.scan.fingerprint
        measure.complexity = self.scan.complexity
        measure.queries = 1
        measure.bytes_in = size
        measure.bytes_out = size_out
        measure.throttled_seconds = self.throttled
        self.usage.count(self.who, &measure)
        self.traffic.observe(self.throttled)
        self.traffic.bytes_in += size
        self.traffic.bytes_out += size_out
        self.throttled = 0
        return 0

    # Notifications.

    def notify(self, bytes message, Py_ssize_t most, Py_ssize_t most_bytes):
        """Write a notification now, or keep it; False when too many are kept."""
        if self.fd < 0 or self.phase >= CLIENT_LINGER or self.phase == CLIENT_LOGIN:
            return True
        if self.told_later is None and self.is_between():
            self.send(message)
            return True
        if self.told_later is None:
            self.told_later = deque()
        if (
            len(self.told_later) >= most
            or self.told_later_bytes + len(message) > most_bytes
        ):
            return False
        self.told_later.append(message)
        self.told_later_bytes += len(message)
        return True

    def tell(self):
        """Write the notifications that were kept, as many as may be now."""
        while self.told_later is not None and self.fd >= 0 and self.is_between():
            message = self.told_later.popleft()
            self.told_later_bytes -= len(message)
            if not self.told_later:
                self.told_later = None
            self.send(message)

    @property
    def told_later_count(self):
        return 0 if self.told_later is None else len(self.told_later)

    cdef bint is_between(self) noexcept:
        """Outside of transactions and answers, and the client reads."""
        return self.out_size < HIGH_WATER and (
            self.server is None
            or self.server.replies.count == 0
            and self.server.status == b"I"
            and self.server.body_left == 0
            and not self.is_batch_open
        )

    cdef int server_released(self) except -1:
        ViewClient.server_released(self)
        if self.told_later is not None:
            self.tell()
        return 0

    cdef int on_drained(self) except -1:
        ViewClient.on_drained(self)
        if self.told_later is not None:
            self.tell()
        return 0
