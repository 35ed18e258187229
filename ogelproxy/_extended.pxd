from libc.stdint cimport uint8_t, uint32_t

from ogelproxy._naming cimport NamingClient
from ogelproxy._statements cimport Naming, Statement


cdef class ExtendedClient(NamingClient):
    cdef Statement portal             # of the unnamed portal
    cdef dict portals                 # named portals: Statement, this transaction's

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
    cdef uint32_t begins_with(self, char kind, const char* p, Py_ssize_t n) except? 0
    cdef bint may_be_free(self, const char* p, Py_ssize_t size) except -1
    cdef int fake(self, uint8_t asked, Naming naming) except -1
    cdef Statement use_statement(self, char kind, const char* name, Py_ssize_t size)
