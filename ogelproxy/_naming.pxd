from libc.stdint cimport uint64_t

from ogelproxy._simple cimport SimpleClient
from ogelproxy._statements cimport Statement


cdef class NamingClient(SimpleClient):
    cdef dict names                   # its statement names: Statement
    cdef bint draws                   # one of them named a sequence function, ever
    cdef bint shares_names            # statement names are the pool's, not its own
    cdef bint is_unknown              # only the server may know the statement
    cdef bint parsed_unnamed          # in the present batch
    # How many replies its server must have given until it is known what became of
    # the names that messages of this batch, and of earlier ones, change.
    cdef uint64_t names_change
    cdef uint64_t unnamed_change
    cdef uint64_t unnamed_doubt

    cdef bint has_too_many(self) except -1
    cdef int refuse_another(self, char kind) except -1
    cdef bint may_have_raw(self) noexcept
    cdef int note_statement(self, Statement statement) except -1
    cdef int prepare_again(self, Statement statement) except -1
    cdef int emit_query(self, bytes text) except -1
    cdef bint must_wait(self, Py_ssize_t name_size) except -1
    cdef Statement use_statement(self, char kind, const char* name, Py_ssize_t size)
    cdef int emit_renamed(
        self, char kind, const char* before, Py_ssize_t before_size,
        Statement statement, const char* after, Py_ssize_t after_size, Py_ssize_t unseen
    ) except -1
