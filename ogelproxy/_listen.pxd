from libc.stdint cimport uint64_t

from ogelproxy._views cimport ViewClient


cdef class ListenClient(ViewClient):
    cdef object listens              # statements on channels; None while it has none
    cdef readonly bint has_listened  # or tried to: its pool's channels know it
    cdef readonly bint waits_to_listen  # for Postgres's answer to our LISTEN
    cdef public bint is_listening    # to some channel; changed by Channels
    cdef object told_later           # deque of notifications that wait, or None
    cdef readonly Py_ssize_t told_later_bytes

    cdef bint concerns_channels(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) noexcept
    cdef int on_listen(self, char kind, const char* p, Py_ssize_t size) except -1
    cdef int run_listen(
        self, char kind, bytes body, const char* p, Py_ssize_t size
    ) except -1
    cdef int count_listen(
        self, bytes text, Py_ssize_t size, Py_ssize_t size_out
    ) except -1
    cdef bint is_between(self) noexcept
