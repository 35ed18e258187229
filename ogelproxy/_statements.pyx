"""Prepared statements shared by the clients of one pool.

A client's name means a Statement; a Statement has one name on all servers of
the pool. What each client and each server knows is kept by `_relay`; here is
what they share, bounded in bytes.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memchr

from ogelproxy._fingerprint cimport (
    FLAG_PREPARE,
    Scan,
    scan_feed,
    scan_finish,
    scan_start,
)

cdef enum:
    OVERHEAD = 200  # bytes that a Statement takes beside its text


cdef class Statement:

    def __dealloc__(self):
        if self.cache is not None:
            self.cache.bytes_kept -= len(self.body) + OVERHEAD


cdef class Rewriting:

    def __cinit__(self):
        self.namings = []
        self.replaced = []


cdef Naming change_name(bytes name, Statement before, Statement after):
    cdef Naming naming = Naming.__new__(Naming)
    naming.name = name
    naming.before = before
    naming.after = after
    return naming


cdef Statement describe(bytes body):
    """Make a Statement of a Parse message's body behind the name, unshared."""
    cdef Statement statement = Statement.__new__(Statement)
    cdef Scan scan
    cdef const char* text = body
    cdef const char* end = <const char*> memchr(text, 0, len(body))
    scan_start(&scan)
    scan_feed(&scan, text, end - text if end != NULL else len(body))
    scan_finish(&scan)
    statement.body = body
    statement.fingerprint = scan.fingerprint
    statement.complexity = scan.complexity
    statement.flags = scan.flags
    statement.is_free = scan.statements > 0 and (
        scan.free_statements == scan.statements
    )
    return statement


cdef class StatementCache:

    def __init__(self, Py_ssize_t max_bytes):
        self.shared = {}
        self.max_bytes = max_bytes

    def __len__(self):
        return len(self.shared)

    cdef Statement find(self, bytes body, tuple parsing):
        """The statement of this body, made when there is none yet.

        A Parse reads literals and names as the session's settings say, so that
        only clients that have these of them in common share a statement.

        The cache lets go of the statements parsed longest ago when it holds
        more than its bytes; clients that still use one keep it alive.
        """
        key = (parsing, body)
        statement = self.shared.pop(key, None)
        if statement is None:
            statement = self.add(body)
        self.shared[key] = statement
        return statement

    cdef int forget(self) except -1:
        """Have every statement parsed anew by who parses it next."""
        self.shared.clear()
        return 0

    cdef Statement add(self, bytes body):
        """Make a statement that nobody else finds."""
        self.serial += 1
        return self.keep(describe(body), b"o7s_%d" % self.serial, body)

    cdef Statement add_sql(self, bytes before, bytes behind):
        """Make a statement of a PREPARE's text before and behind the name."""
        cdef Statement statement
        self.serial += 1
        name = b"o7s_%d" % self.serial
        body = before + name + behind
        statement = describe(body + b"\0")
        statement.is_sql = True
        statement.flags &= ~<uint32_t> FLAG_PREPARE
        return self.keep(statement, name, body)

    cdef Statement keep(self, Statement statement, bytes name, bytes body):
        statement.server_name = name
        statement.body = body
        statement.cache = self
        self.bytes_kept += len(body) + OVERHEAD
        while self.bytes_kept > self.max_bytes and self.shared:
            del self.shared[next(iter(self.shared))]
        return statement
