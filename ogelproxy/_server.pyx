"""One server connection in the steady state: what it answers, and to whom.

`process` walks the messages of one read. Rows are passed on unseen; what ends a
reply takes it off the queue and is counted; at the last ReadyForQuery outside a
transaction the loan may end. Loans are `_loan`'s, requests `_client`'s, the login
is `server`'s.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from ogelproxy._fingerprint cimport (
    FLAG_DEALLOCATE, FLAG_DISCARD, FLAG_SET_LOCAL, FLAG_TRANSACTION,
)
from ogelproxy._loan cimport (
    SERVER_CLOSED, SERVER_LENT, SERVER_LOGIN, SERVER_RESETTING, Borrower, Lendable,
)
from ogelproxy._connection cimport Connection
from ogelproxy._reactor cimport HIGH_WATER, SCRATCH
from ogelproxy._replies cimport (
    ASKED_BIND, ASKED_CLOSE, ASKED_DESCRIBE, ASKED_EXECUTE, ASKED_FUNCTION,
    ASKED_PARSE, ASKED_QUERY, ASKED_SYNC, REPLY_FAKE, REPLY_FORWARD, REPLY_PROBE,
    REPLY_REFUSE, REPLY_RESTORE, REPLY_SKIP, Reply,
)
from ogelproxy._statements cimport Naming, Rewriting
from ogelproxy._wire cimport HEADER, MAX_MESSAGE, MAX_SEEN, Gather, frame_size, get32
from ogelproxy.errors import ProtocolViolation

cdef extern from "string.h" nogil:
    void* memmem(const void* text, size_t size, const void* part, size_t part_size)


cdef class ServerCore(Lendable):

    @property
    def prepared_count(self):
        return len(self.prepared)

    # Answers.

    cdef int on_readable(self) except -1:
        cdef Py_ssize_t got
        cdef Py_ssize_t used
        if self.phase == SERVER_LOGIN:
            return Connection.on_readable(self)
        if self.phase == SERVER_CLOSED:
            # It is being cancelled: what it still says is for nobody.
            if self.receive(self.reactor.scratch, SCRATCH) < 0:
                self.unwatch()
            return 0
        if self.in_size == 0:
            got = self.receive(self.reactor.scratch, SCRATCH)
            if got <= 0:
                return self.lose() if got < 0 else self.nothing_came()
            used = self.process(self.reactor.scratch, got)
            if used < got and self.fd >= 0:
                self.keep(self.reactor.scratch + used, got - used)
        else:
            got = self.fill(SCRATCH)
            if got <= 0:
                return self.lose() if got < 0 else self.nothing_came()
            used = self.process(self.inbox, self.in_size)
            if self.fd >= 0:
                self.consume(used)
        if self.client is not None and self.client.is_stalled:
            self.client.unstall()
        if self.was_reset and self.replies.count == 0 and self.status != b"E" and (
            # Amid a batch it would take its portals, and commit what it did so far.
            self.client is None or not self.client.is_batch_open
        ):
            self.restore()
        # Only now: settling may hand this server to the next client.
        if self.phase == SERVER_LENT:
            if self.is_settled():
                self.release()
        elif self.phase == SERVER_RESETTING and self.replies.count == 0:
            self.settle()
        return 0

    cdef int nothing_came(self) except -1:
        """TLS had something to say, the server had not."""
        if self.phase == SERVER_RESETTING and self.replies.count == 0:
            return self.settle()
        return 0

    cdef int on_drained(self) except -1:
        if self.client is not None:
            if not self.client.is_stalled:
                self.client.resume()
            if self.phase == SERVER_LENT and self.is_settled():
                self.release()
        return 0

    cdef Py_ssize_t process(self, const char* p, Py_ssize_t n) except -1:
        """Handle the messages in `p`; return the bytes that were used."""
        cdef Gather gather = self.reactor.gather
        cdef Borrower client = self.client
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t size
        cdef Py_ssize_t step
        cdef Reply* head
        cdef bint is_probe
        cdef char kind
        while i < n:
            if self.body_left:
                step = min(self.body_left, n - i)
                self.body_left -= step
                if not self.body_dropped and client is not None:
                    gather.emit(p + i, step)
                    self.bytes_out += step
                i += step
                continue
            if n - i < HEADER:
                break
            size = frame_size(p + i, MAX_MESSAGE)
            if size < 0:
                raise ProtocolViolation("impossible message length", by="server")
            kind = p[i]
            head = self.replies.head()
            if head != NULL and head.action == REPLY_FAKE:
                self.fakes()
                head = self.replies.head()
            is_probe = head != NULL and head.action == REPLY_PROBE
            if size > n - i:
                if (kind != b"D" and kind != b"d" or is_probe) and size <= MAX_SEEN:
                    break
                step = n - i
                self.body_left = size - step
            else:
                step = size
            if kind == b"D" and is_probe:
                self.body_dropped = True
                if client is not None:
                    # Settings too long to be kept are as good as unknown.
                    row = p[i + HEADER:i + step] if step == size else None
                    self.pool.answered(self, client, row)
            elif kind == b"D" or kind == b"d":
                self.rows += 1
                self.pass_on(p + i, step, head)
            elif step < size:
                # Larger than anything that has to be understood.
                self.pass_on(p + i, step, head)
            else:
                self.message(kind, p + i, size, head)
                if self.phase == SERVER_CLOSED:
                    return n
            i += step
        if client is not None:
            if self.body_left == 0:
                self.fakes()
            client.flush_gather()
            if client.out_size > HIGH_WATER:
                self.pause()
        else:
            gather.clear()
        return i

    cdef int flush_rest(self) except -1:
        if self.client is not None:
            self.client.flush_gather()
        return 0

    cdef int pass_on(self, const char* p, Py_ssize_t size, Reply* head) except -1:
        self.body_dropped = (
            self.client is None
            or head != NULL
            and head.action in (REPLY_SKIP, REPLY_RESTORE, REPLY_PROBE)
        )
        if not self.body_dropped:
            self.bytes_out += size
            self.reactor.gather.emit(p, size)
        return 0

    cdef int message(
        self, char kind, const char* p, Py_ssize_t size, Reply* head
    ) except -1:
        cdef uint8_t asked = head.asked if head != NULL else 0
        cdef bytes told
        if kind == b"Z":
            return self.ready(p, size)
        if kind == b"E":
            return self.error(p, size, head)
        if kind == b"C" or kind == b"I" or kind == b"s":
            return self.complete(p, size, head)
        if self.client is None and (kind == b"S" or kind == b"A"):
            return 0
        if kind == b"S" and asked and head.action == REPLY_RESTORE:
            return self.reactor.gather.emit(p, size)
        if kind == b"G" or kind == b"W":
            self.in_copy = True
            if kind == b"G" and head != NULL:
                self.copy_begun()
                if self.ignores_sync and (
                    self.client is None or self.client.is_leaving
                ):
                    self.pass_on(p, size, head)
                    return self.data_missing()
        elif kind == b"S":
            if p[HEADER:size] in self.host.misleading_statuses:
                self.host.lexer_changed(self.client)
                return 0
            if asked and head.action == REPLY_FORWARD and not (
                self.flags & FLAG_SET_LOCAL
            ):
                self.client.touch(p[HEADER:size].partition(b"\0")[0])
        if kind == b"A" and size >= HEADER + 4:
            # It comes when it will, amid an answer that is the proxy's own too.
            self.bytes_out += size
            if get32(p + HEADER) != self.process_id:
                return self.reactor.gather.emit(p, size)
            # From itself, as it knows by its process id.
            told = self.client.renumbered(p[:size])
            return self.reactor.gather.copy(PyBytes_AS_STRING(told), len(told))
        self.pass_on(p, size, head)
        if (
            kind == b"1" and asked == ASKED_PARSE
            or kind == b"2" and asked == ASKED_BIND
            or kind == b"3" and asked == ASKED_CLOSE
            or (kind == b"T" or kind == b"n") and asked == ASKED_DESCRIBE
        ):
            self.replies.pop()
        elif kind in b"123n" and asked != ASKED_QUERY:
            raise ProtocolViolation(f"unexpected message {chr(kind)!r}", by="server")
        return 0

    cdef int data_missing(self) except -1:
        """End a COPY IN whose data will never come: its client said goodbye."""
        if self.client is not None:
            self.client.flush_gather()
            return self.client.left()
        self.phase = SERVER_CLOSED
        self.host.abandon(self, True)
        return 0

    cdef int fakes(self) except -1:
        """Answer what the server was never asked, up to the next that it was."""
        cdef Reply* head
        while self.replies.count:
            head = self.replies.head()
            if head.action != REPLY_FAKE:
                break
            if head.asked == ASKED_PARSE:
                self.reactor.gather.copy(b"1\0\0\0\4", HEADER)
            elif head.asked == ASKED_CLOSE:
                self.reactor.gather.copy(b"3\0\0\0\4", HEADER)
            self.replies.pop()
        return 0

    cdef int complete(self, const char* p, Py_ssize_t size, Reply* head) except -1:
        """CommandComplete, EmptyQueryResponse or PortalSuspended."""
        cdef Py_ssize_t at = size - 2
        cdef uint64_t rows = 0
        cdef uint64_t scale = 1
        self.in_copy = False
        self.pass_on(p, size, head)
        if head == NULL:
            return 0
        if p[0] == b"C":
            # The tag ends with the number of rows where there is one.
            while at > HEADER and b"0" <= p[at] <= b"9" and scale < 10**18:
                rows += (p[at] - 48) * scale
                scale *= 10
                at -= 1
            if self.flags & (FLAG_DEALLOCATE | FLAG_DISCARD) and (
                size == 20 and memcmp(p + HEADER, b"DEALLOCATE ALL", 14) == 0
                or size == 17 and memcmp(p + HEADER, b"DISCARD ALL", 11) == 0
            ):
                self.prepared.clear()
                if self.client is not None:
                    self.client.statements_dropped()
            self.was_reset = self.was_reset or head.action == REPLY_FORWARD and (
                size == 11 and memcmp(p + HEADER, b"RESET", 6) == 0
                or size == 17 and memcmp(p + HEADER, b"DISCARD ALL", 12) == 0
            )
        if head.is_rewritten:
            (<Rewriting> <object> head.thing).completed += 1
        if rows > self.rows:
            self.rows = rows
        head.rows += self.rows
        self.rows = 0
        if head.asked == ASKED_EXECUTE:
            self.count(head)
            self.replies.pop()
        return 0

    cdef int error(self, const char* p, Py_ssize_t size, Reply* head) except -1:
        """ErrorResponse: of the whole batch in the extended protocol."""
        cdef const char* at = p + HEADER
        cdef const char* end = p + size
        cdef const char* stop
        cdef bytes refusal
        cdef bytes told
        cdef Naming naming
        cdef Rewriting rewriting
        cdef list changes = []
        cdef uint8_t was_counted = 0
        cdef char[5] sqlstate
        self.in_copy = self.ignores_sync = False
        self.had_error = True
        memcpy(sqlstate, b"XX000", 5)
        while at < end and at[0] != 0:
            stop = <const char*> memchr(at, 0, end - at)
            if stop == NULL:
                break
            if at[0] == b"C" and stop - at == 6:
                memcpy(sqlstate, at + 1, 5)
            elif at[0] == b"V" and (at[1] == b"F" or at[1] == b"P"):
                self.told_why = True
            elif (
                stop - at == 22 and memcmp(at, b"RRevalidateCachedQuery", 22) == 0
                or stop - at > 20 and memcmp(at, b"Mcache lookup failed", 20) == 0
            ):
                # A table or type changed, and with it what a statement returns.
                self.pool.statements.forget()
            at = stop + 1
        if head == NULL:
            # Nobody asked: the server says why it ends.
            self.is_retiring = True
            return self.pass_on(p, size, NULL)
        head.failed = 1
        memcpy(head.sqlstate, sqlstate, 5)
        if head.action == REPLY_REFUSE:
            refusal = <bytes> head.thing
            self.bytes_out += len(refusal)
            self.reactor.gather.copy(PyBytes_AS_STRING(refusal), len(refusal))
        elif head.action == REPLY_PROBE:
            self.body_dropped = True
            if self.client is not None:
                self.pool.answered(self, self.client, None)
            else:
                self.is_retiring = True
        elif head.action == REPLY_SKIP and head.thing != NULL and (
            head.asked == ASKED_QUERY
            or head.asked == ASKED_PARSE and self.replies.count > 1
            # In no batch of the client's: with a Sync of its own.
            and self.replies.at(1).asked == ASKED_SYNC
            and self.replies.at(1).action == REPLY_SKIP
        ):
            # A PREPARE sent again failed: so does what was to run the statement.
            naming = <Naming> <object> head.thing
            self.prepared.pop(naming.after, None)
            self.body_dropped = True
            self.refuse_query(p[:size])
        elif head.action in (REPLY_SKIP, REPLY_RESTORE) and head.asked == ASKED_QUERY:
            # A setting or a reset of ours failed: the state can't be known.
            self.settings = None
            self.is_retiring = True
            self.body_dropped = True
            if self.client is not None:
                self.host.settings_refused(self.client, p[HEADER:size])
        else:
            head.action = REPLY_FORWARD
            rewriting = <Rewriting> <object> head.thing if head.is_rewritten else None
            if rewriting is not None and rewriting.refusal is not None:
                self.bytes_out += len(rewriting.refusal)
                self.reactor.gather.copy(
                    PyBytes_AS_STRING(rewriting.refusal), len(rewriting.refusal)
                )
            elif self.client is not None and (
                rewriting is not None or memmem(p, size, b"o7s_", 4) != NULL
            ):
                # It speaks of a statement, or of a place, by the server's name.
                told = self.client.reword(
                    p[HEADER:size], None if rewriting is None else rewriting.replaced
                )
                self.reactor.gather.copy(PyBytes_AS_STRING(told), len(told))
                self.bytes_out += len(told)
            else:
                self.pass_on(p, size, head)
            if rewriting is not None:
                self.undo(rewriting)
        if head.asked in (ASKED_QUERY, ASKED_SYNC, ASKED_FUNCTION):
            return 0
        # The rest of the batch is skipped up to its Sync (manual 55.2.3). The
        # first query in it is the one that failed.
        while self.replies.count:
            head = self.replies.head()
            if head.asked == ASKED_SYNC:
                break
            if head.asked == ASKED_EXECUTE and head.thing != NULL and (
                head.action != REPLY_REFUSE
            ):
                # A PREPARE sent again.
                naming = <Naming> <object> head.thing
                self.prepared.pop(naming.after, None)
            elif head.asked == ASKED_EXECUTE and not was_counted:
                was_counted = 1
                head.failed = 1
                memcpy(head.sqlstate, sqlstate, 5)
                self.count(head)
            elif head.is_unnamed:
                self.unnamed_serial = 0
                if head.action == REPLY_FORWARD and self.client is not None:
                    self.client.unnamed_lost(head.fingerprint)
            elif head.thing != NULL and head.action != REPLY_REFUSE:
                naming = <Naming> <object> head.thing
                if head.asked == ASKED_PARSE and head.action != REPLY_FAKE:
                    self.prepared.pop(naming.after, None)
                changes.append(naming)
            elif head.asked == ASKED_CLOSE and head.action == REPLY_SKIP:
                # An evicted statement stays on the server, unknown to us.
                self.is_retiring = True
            self.replies.pop()
        if self.client is not None:
            self.client.names_skipped(changes)
            if self.replies.count == 0:
                # What else the client sends before its Sync will be skipped too.
                self.client.is_dropping = self.client.is_batch_open = True
        elif self.replies.count == 0:
            # Its Sync will never come.
            self.is_retiring = True
        return 0

    cdef int refuse_query(self, bytes error) except -1:
        """Have the error of the client's next query replaced by `error`."""
        cdef Rewriting rewriting
        cdef Reply* reply
        cdef uint32_t index
        for index in range(1, self.replies.count):
            reply = self.replies.at(index)
            if reply.action != REPLY_SKIP and reply.is_rewritten:
                rewriting = <Rewriting> <object> reply.thing
                if rewriting.refusal is None:
                    # What fails behind the first fails because of it.
                    rewriting.refusal = error
                break
        return 0

    cdef int undo(self, Rewriting rewriting) except -1:
        """A query failed: what it was to name from there on hasn't changed."""
        cdef Naming naming
        cdef list undone = []
        for naming, index in rewriting.namings:
            if index < rewriting.completed:
                continue
            if naming.after is not None:
                self.prepared.pop(naming.after, None)
            elif rewriting.refusal is None:
                self.prepared[naming.before] = None
            undone.append(naming)
        if self.client is not None:
            self.client.names_skipped(undone)
        return 0

    cdef int ready(self, const char* p, Py_ssize_t size) except -1:
        """ReadyForQuery: one request is answered in full."""
        cdef Reply* head = self.replies.head()
        cdef Borrower client = self.client
        if head == NULL or size != 6 or head.asked not in (
            ASKED_SYNC, ASKED_QUERY, ASKED_FUNCTION
        ):
            raise ProtocolViolation("unexpected ReadyForQuery", by="server")
        if self.status == b"I":
            self.transaction_at = head.started
        self.status = p[HEADER]
        if head.action in (REPLY_SKIP, REPLY_RESTORE, REPLY_PROBE):
            if head.action == REPLY_PROBE:
                self.probing = 0
            self.rows = 0
            self.replies.pop()
            return 0
        if client is not None and client.notice is not None:
            self.reactor.gather.copy(
                PyBytes_AS_STRING(client.notice), len(client.notice)
            )
            client.notice = None
        self.pass_on(p, size, head)
        if head.asked != ASKED_SYNC:
            self.count(head)
        self.last_done = self.reactor.now
        if client is not None and self.status == b"I":
            client.traffic.transactions += 1
            client.traffic.transaction_seconds += self.last_done - self.transaction_at
        self.replies.pop()
        if self.replies.count == 0 and self.status == b"I":
            self.flags &= ~<uint32_t> (FLAG_SET_LOCAL | FLAG_TRANSACTION)
        return 0

    cpdef int lose(self) except -1:
        """Treat the server as gone: it is, or broke the protocol."""
        cdef Borrower client = self.client
        if client is not None:
            self.count_rest(True)
            self.client = None
            client.server = None
            self.host.server_lost(self)
            client.server_gone(self.body_left == 0 and not self.told_why)
        else:
            self.host.server_lost(self)
        return 0
