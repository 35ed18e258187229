from ogelproxy._extended cimport ExtendedClient


cdef enum:  # what view() answers
    PASSED      # nothing of ours: the server's
    ANSWERED
    DELAYED     # an earlier answer, or what it needs, is waited for; handled again then


cdef class ViewClient(ExtendedClient):
    cdef public object views         # its statements on views; None while it has none
    cdef bint was_answered           # here, since the last Sync and request to a server

    cdef bint may_be_view(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) noexcept
    cdef int view(self, char kind, const char* p, Py_ssize_t size) except -1
    cdef bint answers_first(self) except -1
    cdef bytes ready(self)
