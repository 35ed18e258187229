from libc.stdint cimport uint8_t, uint64_t

from ogelproxy._simple cimport SimpleClient
from ogelproxy._statements cimport Naming, Statement


cdef class ExtendedClient(SimpleClient):
    cdef Statement portal             # of the unnamed portal
    cdef dict portals                 # named portals: Statement, this transaction's
    cdef dict names                   # its statement names: Statement
    cdef bint shares_names            # statement names are the pool's, not its own
    cdef bint parsed_unnamed          # in the present batch
    # How many replies its server must have given until it is known what became of
    # the names that messages of this batch, and of earlier ones, change.
    cdef uint64_t names_change
    cdef uint64_t unnamed_change
    cdef uint64_t unnamed_doubt

    cdef Py_ssize_t on_parse(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef Py_ssize_t on_bind(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef Py_ssize_t on_execute(self, const char* p, Py_ssize_t size) except -1
    cdef Py_ssize_t on_describe(self, const char* p, Py_ssize_t size) except -1
    cdef Py_ssize_t on_close(self, const char* p, Py_ssize_t size) except -1
    cdef Py_ssize_t on_sync(self, const char* p, Py_ssize_t size) except -1
    cdef int begin_batch(self, char kind, const char* p, Py_ssize_t n) except -1
    cdef bint batch_executes(self, const char* p, Py_ssize_t n) except -1
    cdef bint may_be_free(self, const char* p, Py_ssize_t size) except -1
    cdef bint must_wait(self, Py_ssize_t name_size) except -1
    cdef int fake(self, uint8_t asked, Naming naming) except -1
    cdef Statement use_statement(self, char kind, const char* name, Py_ssize_t size)
    cdef int emit_renamed(
        self, char kind, const char* before, Py_ssize_t before_size,
        Statement statement, const char* after, Py_ssize_t after_size, Py_ssize_t unseen
    ) except -1
