from libc.stdint cimport uint32_t

from ogelproxy._client cimport ClientCore
from ogelproxy._fingerprint cimport Scan
from ogelproxy._replies cimport Reply


cdef class SimpleClient(ClientCore):
    cdef Scan scan                    # of the query at hand
    cdef uint32_t scanned_index       # which reply the scanned message will get
    cdef bint is_scanned              # to its end
    cdef uint32_t scan_paid           # tokens taken for it
    cdef uint32_t scan_owed           # tokens that it costs beside these

    cdef bint breaks_mode(self, uint32_t flags) noexcept
    cdef bytes mode_refusal(self, uint32_t flags)
    cdef Py_ssize_t on_query(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef Reply* ask_query(self, Py_ssize_t size) except NULL
    cdef bint on_named(self, const char* p, Py_ssize_t size) except -1
    cdef Py_ssize_t on_function(
        self, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1
    cdef int end_scan(self) except -1
