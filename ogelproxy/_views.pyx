"""Requests about the client itself: `SHOW o7s.…`, answered without a server.

They cost no token and are no usage. A client that never asked pays one comparison
per Query and Parse. Which views there are, and what they say, is `console`'s; here
they get their place among the answers of the server.
"""

from libc.string cimport memchr
from posix.strings cimport strncasecmp

from ogelproxy._client cimport CLIENT_READY
from ogelproxy._extended cimport ExtendedClient
from ogelproxy._wire cimport HEADER, MAX_SEEN

cdef enum:
    MARK_SIZE = 9

cdef const char* MARK = "show o7s."


cdef inline bint is_marked(const char* text, Py_ssize_t size) noexcept nogil:
    while size > MARK_SIZE and text[0] in b" \t\r\n":
        text += 1
        size -= 1
    return size > MARK_SIZE and strncasecmp(text, MARK, MARK_SIZE) == 0


cdef inline bint parses_marked(const char* p, Py_ssize_t size) noexcept nogil:
    cdef const char* text = <const char*> memchr(p + HEADER, 0, size - HEADER)
    return text != NULL and is_marked(text + 1, p + size - text - 1)


cdef class ViewClient(ExtendedClient):

    @property
    def prepared_count(self):
        return len(self.names)

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef int verdict
        if kind == b"S":
            if self.was_answered and not self.is_batch_open and not self.is_dropping:
                self.was_answered = False
                self.send(self.ready())
                return size
            self.was_answered = False
        elif self.may_be_view(kind, p, size, min(size, have)):
            verdict = self.view(kind, p, size) if size <= have else DELAYED
            if verdict != PASSED:
                return size if verdict == ANSWERED else 0
        if kind == b"Q":
            self.was_answered = False
        return ExtendedClient.request(self, kind, p, size, have)

    cdef bint may_be_view(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) noexcept:
        if kind == b"Q":
            return not self.is_batch_open and size <= MAX_SEEN and is_marked(
                p + HEADER, have - HEADER
            )
        if self.views is None and (kind != b"P" or not parses_marked(p, have)):
            return False
        return kind in b"PBDEC" and size <= MAX_SEEN

    cdef int view(self, char kind, const char* p, Py_ssize_t size) except -1:
        """Answer a message that is about a view."""
        cdef bytes answer
        cdef bytes body = p[HEADER:size]
        if self.views is None:
            self.views = self.host.views()
        if not self.views.takes(chr(kind), body):
            if not self.views:
                self.views = None
            return PASSED
        if self.answers_first():
            return DELAYED
        if self.server is not None and self.server.status == b"E":
            # The server refuses it, as it does all else.
            return PASSED
        answer = self.views.answer(self, chr(kind), body)
        if answer is None:
            # It is being asked for: `carry_on` has the message handled again.
            self.is_stalled = True
            self.pause()
            return DELAYED
        if answer[0] == b"E":
            self.refuse(kind, answer)
        elif kind == b"Q":
            self.send(answer + self.ready())
        else:
            self.was_answered = True
            self.send(answer)
        return ANSWERED

    def carry_on(self):
        if self.is_stalled and self.phase == CLIENT_READY:
            self.unstall()

    cdef bint answers_first(self) except -1:
        """Wait for answers of the server that come before one of ours, if any."""
        if self.server is not None and self.server.replies.count:
            # Answers of ours that are still to be given may be all that is owed.
            self.flush_requests()
        if self.server is None or not (
            self.server.replies.count or self.server.body_left
        ):
            return False
        if self.is_batch_open:
            # Before a Sync, Postgres answers when asked to (manual 55.2.3).
            self.reactor.gather.copy(b"H\0\0\0\4", HEADER)
        self.is_stalled = True
        self.pause()
        return True

    cdef bytes ready(self):
        """ReadyForQuery."""
        status = b"I" if self.server is None else bytes([self.server.status])
        return b"Z\0\0\0\x05" + status
