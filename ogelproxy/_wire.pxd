# Framing of the Postgres protocol (manual 55.2.1): the one place that reads a
# length from the wire. Every other function receives sizes proven here.

cimport cython
from libc.stdint cimport uint8_t, uint32_t


cdef enum:
    HEADER = 5                # bytes: type, int32 length
    MAX_MESSAGE = 0x3fffffff  # bytes after the type: Postgres's own large limit
    MAX_SEEN = 1 << 20        # bytes of a message that has to be seen whole


cdef inline uint32_t get32(const char* p) noexcept nogil:
    return (
        (<uint32_t> (<uint8_t> p[0]) << 24)
        | (<uint32_t> (<uint8_t> p[1]) << 16)
        | (<uint32_t> (<uint8_t> p[2]) << 8)
        | <uint32_t> (<uint8_t> p[3])
    )


cdef inline void put32(char* p, uint32_t value) noexcept nogil:
    p[0] = <char> (value >> 24)
    p[1] = <char> (value >> 16)
    p[2] = <char> (value >> 8)
    p[3] = <char> value


cdef inline Py_ssize_t frame_size(const char* p, uint32_t limit) noexcept nogil:
    """The size of the message at `p`, type byte included; -1 when it can't be."""
    cdef uint32_t length = get32(p + 1)
    if length < 4 or length > limit:
        return -1
    return <Py_ssize_t> length + 1


@cython.final
cdef class Gather:
    # Collects the pieces of one write. Pieces that lie behind one another in
    # memory stay where they are, so a run of untouched messages is never
    # copied; only a rewritten one makes the rest go through the buffer.
    cdef const char* run      # the untouched run, not yet copied
    cdef Py_ssize_t run_size
    cdef char* buffer         # what had to be copied
    cdef Py_ssize_t size      # bytes in it
    cdef Py_ssize_t capacity

    cdef inline int emit(self, const char* data, Py_ssize_t size) except -1:
        if self.run_size and self.run + self.run_size == data:
            self.run_size += size
        elif self.run_size == 0 and self.size == 0:
            self.run = data
            self.run_size = size
        else:
            self.copy(data, size)
        return 0

    cdef int copy(self, const char* data, Py_ssize_t size) except -1
    cdef char* reserve(self, Py_ssize_t size) except NULL
    cdef inline void clear(self) noexcept:
        self.run_size = 0
        self.size = 0
