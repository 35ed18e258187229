"""The extended protocol: batches, prepared statements and portals.

What names of statements mean is `_naming`'s. Rules of the manual's 55.2.3.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memchr, memcmp

from ogelproxy._bucket cimport MODE_OFF
from ogelproxy._client cimport (
    CLIENT_READY,
    HELD,
    PAID,
    REFUSED,
)
from ogelproxy._fingerprint cimport (
    FLAG_ANY_SETTING,
    FLAG_DDL,
    FLAG_DEALLOCATE,
    FLAG_DISCARD,
    FLAG_ROLE,
    FLAG_SEQUENCE,
    FLAG_SET,
    FLAG_SET_CONFIG,
    FLAG_SET_LOCAL,
    FLAG_TEMP,
    FLAG_TRANSACTION,
)
from ogelproxy._replies cimport (
    ASKED_BIND,
    ASKED_CLOSE,
    ASKED_DESCRIBE,
    ASKED_EXECUTE,
    ASKED_PARSE,
    ASKED_SYNC,
    REPLY_FAKE,
    REPLY_FORWARD,
    Reply,
)
from ogelproxy._statements cimport change_name, describe
from ogelproxy._wire cimport HEADER, MAX_MESSAGE, MAX_SEEN, frame_size
from ogelproxy.errors import ProtocolViolation

cdef enum:
    # What makes a loan's session read statements in another way than its client's
    # settings do.
    UNSHARED = (
        FLAG_ANY_SETTING | FLAG_DDL | FLAG_ROLE | FLAG_SET | FLAG_SET_CONFIG
        | FLAG_SET_LOCAL | FLAG_TEMP
    )

cdef enum:
    NAMES_SEEN = 4096       # bytes of a message in which its names have to end
    MAX_PORTALS = 1000      # named portals of one transaction whose text is known


cdef bint may_draw(const char* text, const char* end) noexcept nogil:
    """Whether a text may call nextval, lastval or the like: finds any `val`."""
    cdef const char* at
    cdef char letter
    for letter in b"vV":
        at = <const char*> memchr(text, letter, end - text)
        while at != NULL:
            if end - at > 2 and at[1] | 32 == b"a" and at[2] | 32 == b"l":
                return True
            at = <const char*> memchr(at + 1, letter, end - at - 1)
    return False


cdef class ExtendedClient(NamingClient):

    cdef int prepare_names(self) except -1:
        self.portals = {}
        return NamingClient.prepare_names(self)

    cdef int server_released(self) except -1:
        if self.portals:
            self.portals.clear()
        self.names_change = self.names_doubt = 0
        self.unnamed_change = self.unnamed_doubt = 0
        return 0

    # Batches.

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef Py_ssize_t needed = size
        if kind not in b"PBDECSH":
            return NamingClient.request(self, kind, p, size, have)
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
        if not self.is_batch_open and self.begins_with(kind, p, have) & FLAG_SEQUENCE:
            self.server.forget_sequences()
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
                    self.bucket.tokens(self.reactor.now) < 1
                    and size <= n - i
                    and memchr(p + i + HEADER, 0, size - HEADER) != NULL
                    and self.may_be_free(p + i, size)
                ):
                    return False
            i += size
        return False

    cdef uint32_t begins_with(self, char kind, const char* p, Py_ssize_t n) except? 0:
        """The flags of the statement that a batch begins with."""
        cdef const char* name = <const char*> memchr(p + HEADER, 0, n - HEADER)
        cdef const char* end = NULL
        cdef Statement statement = None
        if name == NULL or kind != b"P" and kind != b"B":
            return 0
        name += 1
        end = <const char*> memchr(name, 0, p + n - name)
        if end == NULL:
            return 0
        if kind == b"P":
            # Looked at closely only when it could be.
            if not may_draw(name, end):
                return 0
            statement = describe(name[:end - name])
        elif end > name:
            statement = self.names.get(name[:end - name]) if self.draws else None
        else:
            statement = self.unnamed
        return 0 if statement is None else statement.flags

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

    cdef int fake(self, uint8_t asked, Naming naming) except -1:
        """Have a message answered in its turn that the server never sees."""
        cdef Reply* reply = self.server.replies.push(asked, REPLY_FAKE)
        Py_INCREF(naming)
        reply.thing = <PyObject*> naming
        return 0

    cdef Py_ssize_t on_parse(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef const char* name = p + HEADER
        cdef const char* body = <const char*> memchr(
            name, 0, min(have, <Py_ssize_t> NAMES_SEEN) - HEADER
        )
        cdef Py_ssize_t body_size
        cdef Statement statement
        cdef Naming naming
        cdef Reply* reply
        if body == NULL:
            raise ProtocolViolation("statement name is not terminated")
        body += 1
        body_size = p + have - body
        if body - name > 1 and self.shares_names:
            if self.must_wait(body - name - 1):
                return 0
            key = name[:body - name - 1]
            if key in self.names:
                self.refuse(b"P", self.host.statement_exists(key))
                return self.drop(size, have)
            if size > have or self.has_too_many():
                self.refuse_another(b"P")
                return self.drop(size, have)
            text = PyBytes_FromStringAndSize(body, body_size)
            if self.server.status == b"E" or UNSHARED & (
                self.server.flags | self.server.probing | self.held_by
            ):
                statement = self.pool.statements.add(text)
            else:
                statement = self.pool.statements.find(text, self.settings.parsing)
            self.names[key] = statement
            self.draws = self.draws or statement.flags & FLAG_SEQUENCE != 0
            self.traffic.client_parses += 1
            self.pool.statements.tick += 1
            statement.last_used = self.pool.statements.tick
            naming = change_name(key, None, statement)
            if statement in self.server.prepared:
                self.fake(ASKED_PARSE, naming)
            else:
                self.server.prepare(naming, REPLY_FORWARD)
            self.names_change = self.server.replies.pushed()
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
            self.pool.statements.tick += 1
            reply.is_unnamed = 1
            reply.fingerprint = self.unnamed_serial = self.pool.statements.tick
            self.server.unnamed_serial = self.unnamed_serial
            self.parsed_unnamed = True
            self.unnamed_change = self.server.replies.pushed()
        elif not self.has_too_many():
            statement = describe(PyBytes_FromStringAndSize(body, body_size))
            # Whether this Parse will succeed isn't known: the name may go on to
            # mean what it meant.
            statement.is_free = False
            self.names[name[:body - name - 1]] = statement
            self.draws = self.draws or statement.flags & FLAG_SEQUENCE != 0
        return self.forward(p, size, have)

    cdef Py_ssize_t on_bind(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef const char* end = p + have
        cdef const char* seen = p + min(have, <Py_ssize_t> NAMES_SEEN)
        cdef const char* portal = p + HEADER
        cdef const char* name = <const char*> memchr(portal, 0, seen - portal)
        cdef const char* rest = NULL
        cdef Statement statement
        if name != NULL:
            name += 1
            rest = <const char*> memchr(name, 0, seen - name)
        if name == NULL or rest == NULL:
            raise ProtocolViolation("portal or statement name is not terminated")
        if self.shares_names:
            if self.must_wait(rest - name):
                return 0
            statement = self.use_statement(b"B", name, rest - name)
            if statement is None and not self.is_unknown:
                return self.drop(size, have)
        elif rest == name:
            statement = self.unnamed
            if statement is not None and statement.is_free and self.must_wait(0):
                return 0
        else:
            statement = self.names.get(name[:rest - name])
        if statement is not None and statement.flags:
            # Already here: its portal may be run when its name is forgotten.
            self.note_statement(statement)
        if name - portal == 1:
            self.portal = statement
        elif len(self.portals) < MAX_PORTALS:
            self.portals[portal[:name - portal - 1]] = statement
        self.ask(ASKED_BIND, size)
        self.traffic.binds += 1
        if statement is None or not self.shares_names or rest == name:
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
        if statement is not None and self.breaks_mode(statement.flags):
            self.refuse(b"E", self.mode_refusal(statement.flags))
            return size
        # Of a named portal it isn't known whether the Bind that named it succeeded.
        is_free = statement is not None and statement.is_free and p[HEADER] == 0
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
            self.server.flags |= statement.flags & FLAG_TRANSACTION
        else:
            reply.complexity = 100
        self.reactor.gather.emit(p, size)
        if (
            self.shares_names
            and statement is not None
            and statement.flags & (FLAG_DEALLOCATE | FLAG_DISCARD)
        ):
            # It may drop names that the rest of the batch gives or uses: what they
            # mean then waits for its answer, so that has to come before the Sync.
            self.names_doubt = self.server.replies.pushed()
            self.reactor.gather.copy(b"H\0\0\0\4", HEADER)
        return size

    cdef Py_ssize_t on_describe(self, const char* p, Py_ssize_t size) except -1:
        cdef Statement statement
        if size < HEADER + 2 or p[size - 1] != 0:
            raise ProtocolViolation("Describe is malformed")
        if self.shares_names and p[HEADER] == b"S":
            if self.must_wait(size - HEADER - 2):
                return 0
            statement = self.use_statement(b"D", p + HEADER + 1, size - HEADER - 2)
            if statement is None and not self.is_unknown:
                return size
            if size > HEADER + 2 and statement is not None:
                self.ask(ASKED_DESCRIBE, size)
                self.emit_renamed(b"D", p + HEADER, 1, statement, b"", 0, 0)
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
        elif self.shares_names:
            if self.must_wait(len(name)):
                return 0
            if name not in self.names and self.may_have_raw():
                self.ask(ASKED_CLOSE, size)
                self.reactor.gather.emit(p, size)
                return size
            # Others may use the statement: it stays on the server.
            self.fake(ASKED_CLOSE, change_name(name, self.names.pop(name, None), None))
            self.names_change = self.server.replies.pushed()
            return size
        else:
            self.names.pop(name, None)
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
        if not self.server.ignores_sync:
            self.is_batch_open = False
        self.parsed_unnamed = False
        self.names_doubt = max(self.names_doubt, self.names_change)
        self.unnamed_doubt = max(self.unnamed_doubt, self.unnamed_change)
        if not self.server.ignores_sync:
            self.ask(ASKED_SYNC, size)
        self.reactor.gather.emit(p, size)
        return size
