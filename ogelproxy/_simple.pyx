"""The simple protocol: query strings and function calls (manual 55.2.2, 55.2.4)."""

from libc.stdint cimport uint32_t

from ogelproxy._client cimport HELD, REFUSED
from ogelproxy._fingerprint cimport (
    FLAG_DEALLOCATE,
    FLAG_DISCARD,
    FLAG_EXECUTE,
    FLAG_LISTEN,
    FLAG_PREPARE,
    FLAG_ROLE,
    FLAG_SEQUENCE,
    FLAG_SET,
    FLAG_SET_CONFIG,
    FLAG_TRANSACTION,
    scan_feed,
    scan_finish,
    scan_start,
)
from ogelproxy._pool cimport MODE_STATEMENT, MODE_TRANSACTION
from ogelproxy._replies cimport ASKED_FUNCTION, ASKED_QUERY, Reply
from ogelproxy._wire cimport HEADER, MAX_SEEN

cdef enum:
    FUNCTION_CALL = 1       # the fingerprint of every function call message
    NAMING = FLAG_PREPARE | FLAG_EXECUTE | FLAG_DEALLOCATE
    NOTED = FLAG_SET | FLAG_SET_CONFIG | FLAG_ROLE | FLAG_DISCARD


cdef class SimpleClient(ClientCore):

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        if kind == b"Q":
            return self.on_query(p, size, have)
        if kind == b"F":
            return self.on_function(p, size, have)
        return ClientCore.request(self, kind, p, size, have)

    cdef bint breaks_mode(self, uint32_t flags) noexcept:
        """Whether the pool mode can't do it: the server goes to others too soon."""
        if self.pool.mode == MODE_STATEMENT and flags & FLAG_TRANSACTION:
            return True
        return flags & FLAG_LISTEN and (
            self.pool.mode == MODE_TRANSACTION or self.pool.mode == MODE_STATEMENT
        )

    cdef bytes mode_refusal(self, uint32_t flags):
        if flags & FLAG_LISTEN:
            return self.host.listen_refused
        return self.host.transaction_refused

    cdef Py_ssize_t on_query(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        cdef bint is_whole = size <= have
        cdef uint32_t cost
        cdef uint32_t paid
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
        if self.breaks_mode(self.scan.flags):
            self.refuse(b"Q", self.mode_refusal(self.scan.flags))
            return self.drop(size, have)
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
        paid = self.prepaid  # for less, perhaps, than has come during a wait
        if is_whole and self.scan.flags & NAMING:
            if self.on_named(p, size):
                return size
            if self.is_stalled:
                return 0
        if self.scan.flags & FLAG_SEQUENCE:
            self.server.forget_sequences()
        reply = self.ask_query(size)
        if is_whole:
            if self.scan.flags & NOTED:
                self.note(self.scan.flags, p[HEADER:size - 1])
            else:
                self.server.flags |= self.scan.flags
        else:
            reply.fingerprint = 0
            reply.queries = 1
            reply.complexity = 100
            self.is_scanning = True
            self.is_scanned = False
            self.scan_paid = paid
            self.scanned_index = (
                self.server.replies.first + self.server.replies.count - 1
            )
        if not is_whole or self.scan.flags & (FLAG_DEALLOCATE | FLAG_DISCARD):
            self.names_doubt = self.server.replies.pushed()
        return self.forward(p, size, have)

    cdef Reply* ask_query(self, Py_ssize_t size) except NULL:
        """Note that a reply is owed for the query that was scanned."""
        cdef Reply* reply = self.ask(ASKED_QUERY, size)
        reply.fingerprint = self.scan.fingerprint
        reply.complexity = self.scan.complexity
        reply.queries = max(self.scan.statements, 1)
        self.prepaid = 0
        self.is_batch_open = False
        self.server.unnamed_serial = 0
        self.unnamed = None
        return reply

    cdef bint on_named(self, const char* p, Py_ssize_t size) except -1:
        """Have a PREPARE, EXECUTE or DEALLOCATE use the server's names.

        Returns False for a query that is to be passed on as it is.
        """
        return False

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
        self.is_batch_open = False
        self.server.unnamed_serial = 0
        reply = self.ask(ASKED_FUNCTION, size)
        reply.queries = 1
        reply.complexity = 100
        reply.fingerprint = FUNCTION_CALL
        return self.forward(p, size, have)

    cdef bint scan_part(self, const char* p, Py_ssize_t size) except -1:
        cdef int verdict
        # The server runs nothing before the last byte: that is kept until what was
        # found late is paid for. What was scanned is not scanned again after a wait.
        if size < self.body_left:
            scan_feed(&self.scan, p, size)
            return True
        if not self.is_scanned:
            scan_feed(&self.scan, p, size - 1)
            self.end_scan()
        if self.scan_owed:
            verdict = self.pay(self.scan_owed)
            if verdict == HELD:
                return False
            if verdict == REFUSED:
                # It can be refused with the connection only.
                self.fail(self.host.refusal(self, self.scan_owed, True))
                return False
        self.is_scanning = False
        return True

    cdef int end_scan(self) except -1:
        """Note what a query was, when the last of it is there."""
        cdef uint32_t cost
        cdef Reply* reply
        scan_finish(&self.scan)
        self.is_scanned = True
        reply = self.server.replies.at(
            self.scanned_index - self.server.replies.first
        )
        reply.fingerprint = self.scan.fingerprint
        reply.complexity = self.scan.complexity
        reply.queries = max(self.scan.statements, 1)
        cost = self.scan.statements - self.scan.free_statements
        self.scan_owed = max(cost, self.scan_paid) - self.scan_paid
        return self.note(self.scan.flags, None)
