cimport cython
from libc.stdint cimport uint32_t, uint64_t


@cython.final
cdef class Statement:
    # One prepared statement of a pool; clients with the same settings that prepare
    # the same text and types share it, whatever name each of them gave it.
    cdef StatementCache cache
    cdef readonly bytes server_name   # its name on servers
    cdef readonly bytes body          # of its Parse, behind the name; or PREPARE's text
    cdef readonly bint is_sql         # made by PREPARE
    cdef readonly uint64_t fingerprint
    cdef readonly uint32_t complexity
    cdef readonly uint32_t flags
    cdef readonly bint is_free        # COMMIT, ROLLBACK: costs no token
    cdef uint64_t last_used           # tick of the cache, for eviction


@cython.final
cdef class StatementCache:
    cdef dict shared                  # (Settings.parsing, body): Statement, in order
    cdef readonly Py_ssize_t bytes_kept
    cdef Py_ssize_t max_bytes
    cdef uint64_t serial
    cdef uint64_t tick

    cdef Statement find(self, bytes body, tuple parsing)
    cdef int forget(self) except -1
    cdef Statement add(self, bytes body)
    cdef Statement add_sql(self, bytes before, bytes behind)
    cdef Statement keep(self, Statement statement, bytes name, bytes body)


@cython.final
cdef class Naming:
    # What a client's Parse or Close changed, to be undone if the server skips it.
    cdef bytes name                   # None where the proxy asked for itself
    cdef Statement before             # what the name meant; None for nothing
    cdef Statement after              # what it means now; None for nothing


@cython.final
cdef class Rewriting:
    # What a query with PREPARE, EXECUTE or DEALLOCATE became on its way.
    cdef list namings                 # (Naming, index of its statement in the query)
    cdef list replaced                # protocol.sql.Replaced, in their order
    cdef int completed                # statements that were
    cdef bytes refusal                # ErrorResponse of what it lacked, or None


cdef Naming change_name(bytes name, Statement before, Statement after)

cdef Statement describe(bytes body)
