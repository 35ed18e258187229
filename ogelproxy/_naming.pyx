"""What a client's names of prepared statements mean, in both protocols.

In session mode statements keep the names that clients give them. In the other
modes a client's name means a Statement that the pool may share: messages are
renamed on their way, and a server that lacks a statement gets its Parse or PREPARE
first.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from ogelproxy._fingerprint cimport (
    FLAG_DEALLOCATE,
    FLAG_DISCARD,
    FLAG_EXECUTE,
    FLAG_PREPARE,
    FLAG_ROLE,
    FLAG_SEQUENCE,
    FLAG_SET,
    FLAG_SET_CONFIG,
    FLAG_TRANSACTION,
)
from ogelproxy._loan cimport Lendable
from ogelproxy._pool cimport MODE_AUTO, MODE_SESSION
from ogelproxy._replies cimport (
    ASKED_PARSE,
    ASKED_QUERY,
    ASKED_SYNC,
    REPLY_SKIP,
    Reply,
)
from ogelproxy._statements cimport Naming, Rewriting, change_name
from ogelproxy._wire cimport HEADER, put32
from ogelproxy.errors import QueryTooLarge

cdef enum:
    MAX_NAMES = 5000        # prepared statements of one client
    MAX_SHARED = 16         # times its bytes that a pool's statements may take
    # What of a statement has to be read to know what it changes.
    NOTED = FLAG_DISCARD | FLAG_ROLE | FLAG_SET | FLAG_SET_CONFIG
    NAMING = FLAG_PREPARE | FLAG_EXECUTE | FLAG_DEALLOCATE

cdef object TOO_MANY = QueryTooLarge(
    hint="close prepared statements that are no longer used"
)


cdef class NamingClient(SimpleClient):

    cdef int prepare_names(self) except -1:
        self.shares_names = self.pool.mode != MODE_SESSION
        self.names = {}
        return 0

    cdef int statements_dropped(self) except -1:
        self.names.clear()
        return 0

    cdef int names_skipped(self, list changes) except -1:
        """Undo changes of names, given in their order, that never came to be."""
        cdef Naming each
        for each in reversed(changes):
            if each.name is None:
                continue
            if each.before is None:
                self.names.pop(each.name, None)
            else:
                self.names[each.name] = each.before
        return 0

    cdef int unnamed_lost(self, uint64_t serial) except -1:
        if self.unnamed_serial == serial:
            self.unnamed = None
        return 0

    cdef bint must_wait(self, Py_ssize_t name_size) except -1:
        """Whether the meaning of a name depends on answers that are still owed.

        Only to earlier batches: the messages of one batch share their fate, so
        that within it names mean what they mean if all goes well.
        """
        cdef uint64_t doubt = self.names_doubt
        if name_size == 0:
            doubt = 0 if self.parsed_unnamed else self.unnamed_doubt
        if doubt <= self.server.replies.popped:
            return False
        self.is_stalled = True
        self.pause()
        return True

    # Use.

    cdef Statement use_statement(self, char kind, const char* name, Py_ssize_t size):
        """Make sure that the server has the statement of this name.

        Returns None when the client has none: it was then answered so, or the
        server may have one of that name itself, `is_unknown`.
        """
        cdef Lendable server = self.server
        cdef Statement statement
        cdef Reply* reply
        self.is_unknown = False
        if size == 0:
            statement = self.unnamed
            if statement is not None:
                if server.unnamed_serial == self.unnamed_serial:
                    return statement
                if statement.body is not None:
                    server.unnamed_serial = self.unnamed_serial
                    reply = server.replies.push(ASKED_PARSE, REPLY_SKIP)
                    reply.is_unnamed = 1
                    reply.fingerprint = self.unnamed_serial
                    self.parsed_unnamed = True
                    self.unnamed_change = server.replies.pushed()
                    self.emit_renamed(
                        b"P", b"", 0, None, PyBytes_AS_STRING(statement.body),
                        len(statement.body), 0,
                    )
                    return statement
        else:
            statement = self.names.get(name[:size])
            if statement is not None:
                self.pool.statements.tick += 1
                statement.last_used = self.pool.statements.tick
                if statement not in server.prepared:
                    server.prepare(change_name(None, None, statement), REPLY_SKIP)
                    self.names_change = server.replies.pushed()
                return statement
            if self.may_have_raw():
                self.is_unknown = True
                return None
        self.refuse(kind, self.host.statement_unknown(name[:size]))
        return None

    cdef bint may_have_raw(self) noexcept:
        """Whether the server may have statements of a PREPARE passed on as it is."""
        cdef uint32_t flags = self.server.flags | self.server.probing | self.held_by
        return flags & FLAG_PREPARE != 0

    cdef int note_statement(self, Statement statement) except -1:
        """Note what session state a statement may make or end when it is run."""
        cdef uint32_t flags = statement.flags & ~<uint32_t> FLAG_TRANSACTION
        if flags & NOTED:
            return self.note(
                flags,
                None if statement.body is None else statement.body.partition(b"\0")[0],
            )
        self.server.flags |= flags
        return 0

    # Prepared statements in SQL.

    cdef bint on_named(self, const char* p, Py_ssize_t size) except -1:
        cdef Lendable server = self.server
        cdef Statement statement
        cdef Rewriting rewriting
        cdef Naming naming
        cdef Reply* reply
        cdef bytes text = p[HEADER:size - 1]
        cdef bytes new
        cdef uint32_t kept = 0
        cdef Py_ssize_t at = 0
        if not self.shares_names:
            return False
        if server.status == b"E":
            if server.replies.count:
                # A ROLLBACK may be on its way: only then is it known who answers.
                self.is_stalled = True
                self.pause()
            return False
        found = self.pool.named_statements(text)
        if not found:
            return False
        if self.must_wait(1):
            return False
        rewriting = Rewriting()
        new = b""
        for named in found:
            statement = self.names.get(named.name)
            naming = None
            if statement is not None:
                # To prepare it twice fails on the server as it would there.
                self.prepare_again(statement)
                if named.verb == "deallocate":
                    del self.names[named.name]
                    del server.prepared[statement]
                    naming = change_name(named.name, statement, None)
                elif named.verb == "execute" and statement.flags:
                    self.note_statement(statement)
            elif named.verb != "prepare" or self.pool.mode == MODE_AUTO:
                # The server knows it, or says that there is none. In auto mode a
                # client is pinned for what it prepares itself.
                kept |= self.scan.flags & NAMING
                continue
            elif self.has_too_many():
                self.prepaid = 0
                self.refuse_another(b"Q")
                return True
            else:
                statement = self.pool.statements.add_sql(
                    text[named.begin:named.start], text[named.end:named.stop]
                )
                server.make_room()
                server.prepared[statement] = None
                self.names[named.name] = statement
                self.draws = self.draws or statement.flags & FLAG_SEQUENCE != 0
                naming = change_name(named.name, None, statement)
            if naming is not None:
                rewriting.namings.append((naming, named.index))
            rewriting.replaced.append(named.replaced(text, statement.server_name))
            new += text[at:named.start] + statement.server_name
            at = named.end
        if not rewriting.replaced:
            return False
        reply = self.ask_query(size)
        reply.is_rewritten = 1
        Py_INCREF(rewriting)
        reply.thing = <PyObject*> rewriting
        if rewriting.namings:
            self.names_doubt = server.replies.pushed()
        if self.scan.flags & NOTED:
            self.note(self.scan.flags & ~<uint32_t> NAMING | kept, text)
        else:
            server.flags |= self.scan.flags & ~<uint32_t> NAMING | kept
        self.emit_query(new + text[at:])
        return True

    cdef int prepare_again(self, Statement statement) except -1:
        """Make sure, outside of a batch, that the server has a statement."""
        cdef Lendable server = self.server
        cdef Naming naming
        cdef Reply* reply
        self.pool.statements.tick += 1
        statement.last_used = self.pool.statements.tick
        if statement in server.prepared:
            return 0
        naming = change_name(None, None, statement)
        if not statement.is_sql:
            server.prepare(naming, REPLY_SKIP)
            server.replies.push(ASKED_SYNC, REPLY_SKIP)
            return self.reactor.gather.copy(b"S\0\0\0\4", HEADER)
        server.make_room()
        server.prepared[statement] = None
        reply = server.replies.push(ASKED_QUERY, REPLY_SKIP)
        Py_INCREF(naming)
        reply.thing = <PyObject*> naming
        return self.emit_query(statement.body)

    cdef int emit_query(self, bytes text) except -1:
        cdef Py_ssize_t size = HEADER + len(text) + 1
        cdef char* p = self.reactor.gather.reserve(size)
        p[0] = b"Q"
        put32(p + 1, <uint32_t> (size - 1))
        memcpy(p + HEADER, PyBytes_AS_STRING(text), size - HEADER)
        return 0

    cdef bint has_too_many(self) except -1:
        """Whether the client, or its organisation, keeps all it may prepared."""
        return (
            len(self.names) >= MAX_NAMES
            or self.pool.statements.bytes_kept
            > MAX_SHARED * self.pool.statements.max_bytes
        )

    cdef int refuse_another(self, char kind) except -1:
        return self.refuse(kind, self.host.error(TOO_MANY))

    cdef bytes reword(self, bytes body, list replaced):
        return self.host.reworded(self, body, replaced)

    def name_of(self, bytes server_name):
        """The client's name of the statement that servers know by this one."""
        cdef Statement statement
        for name, statement in self.names.items():
            if statement.server_name == server_name:
                return name
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
