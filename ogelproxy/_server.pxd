from ogelproxy._loan cimport Lendable
from ogelproxy._replies cimport Reply
from ogelproxy._statements cimport Rewriting


cdef class ServerCore(Lendable):
    cdef int nothing_came(self) except -1
    cdef Py_ssize_t process(self, const char* p, Py_ssize_t n) except -1
    cdef int message(
        self, char kind, const char* p, Py_ssize_t size, Reply* head
    ) except -1
    cdef int pass_on(self, const char* p, Py_ssize_t size, Reply* head) except -1
    cdef int error(self, const char* p, Py_ssize_t size, Reply* head) except -1
    cdef int complete(self, const char* p, Py_ssize_t size, Reply* head) except -1
    cdef int data_missing(self) except -1
    cdef int refuse_query(self, bytes error) except -1
    cdef int undo(self, Rewriting rewriting) except -1
    cdef int ready(self, const char* p, Py_ssize_t size) except -1
    cpdef int lose(self) except -1
