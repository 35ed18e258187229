"""The queue of replies that one server connection owes.

The protocol answers in the order it was asked (manual 55.2.3), so a ring of
what was asked says which reply comes next, what ends it, to whom it goes and
what it counts as. Rules only: `_relay` fills and empties it.
"""

from cpython.ref cimport Py_XDECREF
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef class Replies:

    def __cinit__(self):
        self.capacity = 16
        self.ring = <Reply*> calloc(self.capacity, sizeof(Reply))
        if self.ring == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.ring != NULL:
            self.clear()
        free(self.ring)

    def __len__(self):
        return self.count

    cdef Reply* push(self, uint8_t asked, uint8_t action) except NULL:
        """Add a reply, zeroed, at the end; the pointer holds until the next push."""
        cdef Reply* grown
        cdef Reply* reply
        cdef uint32_t head
        if self.count == self.capacity:
            grown = <Reply*> calloc(self.capacity * 2, sizeof(Reply))
            if grown == NULL:
                raise MemoryError
            head = self.capacity - self.first
            memcpy(grown, self.ring + self.first, head * sizeof(Reply))
            memcpy(grown + head, self.ring, self.first * sizeof(Reply))
            free(self.ring)
            self.ring = grown
            self.capacity *= 2
            self.first = 0
        reply = self.ring + ((self.first + self.count) & (self.capacity - 1))
        memset(reply, 0, sizeof(Reply))
        reply.asked = asked
        reply.action = action
        self.count += 1
        return reply

    cdef void pop(self) noexcept:
        cdef Reply* reply = self.ring + self.first
        Py_XDECREF(reply.thing)
        reply.thing = NULL
        self.first = (self.first + 1) & (self.capacity - 1)
        self.count -= 1
        self.popped += 1

    cdef void clear(self) noexcept:
        while self.count:
            self.pop()
