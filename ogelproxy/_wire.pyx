"""Cut and build messages of the Postgres protocol, version 3.

Knows bytes only: no sockets, no clock. `_relay` is made of it; `split` is the
same cutting for tests and tools.
"""

from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from ogelproxy.errors import ProtocolViolation


def split(data: bytes, limit: int = MAX_MESSAGE):
    cdef const char* p = data
    cdef Py_ssize_t size = len(data)
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t step
    frames = []
    while size - at >= HEADER:
        step = frame_size(p + at, limit)
        if step < 0:
            raise ProtocolViolation("impossible message length")
        if step > size - at:
            break
        frames.append((data[at:at + 1], data[at + HEADER:at + step]))
        at += step
    return frames, data[at:]


cdef class Gather:

    def __cinit__(self):
        self.capacity = 4096
        self.buffer = <char*> malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.buffer)

    cdef int copy(self, const char* data, Py_ssize_t size) except -1:
        memcpy(self.reserve(size), data, size)
        return 0

    cdef char* reserve(self, Py_ssize_t size) except NULL:
        # Whatever ran before goes into the buffer first: order is everything.
        cdef Py_ssize_t need = self.size + self.run_size + size
        cdef char* grown
        if need > self.capacity:
            grown = <char*> realloc(self.buffer, need * 2)
            if grown == NULL:
                raise MemoryError
            self.buffer = grown
            self.capacity = need * 2
        if self.run_size:
            memcpy(self.buffer + self.size, self.run, self.run_size)
            self.size += self.run_size
            self.run_size = 0
        self.size += size
        return self.buffer + self.size - size
