from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from ogelproxy._kernel cimport epoll_event
from ogelproxy._wire cimport Gather


cdef enum:
    SCRATCH = 65536      # bytes read at once
    HIGH_WATER = 65536   # unsent bytes at which the other side is paused
    PIECES = 64          # writes that are put off at most


cdef struct Piece:
    PyObject* connection   # borrowed
    Py_ssize_t at          # where its bytes are
    Py_ssize_t size


cdef class Reactor:
    cdef readonly object loop
    cdef int epoll               # the descriptor that the loop watches
    cdef char* scratch           # one read's bytes, borrowed by every connection
    cdef Gather gather           # one write's pieces, borrowed likewise
    cdef readonly double now     # monotonic seconds at the event being handled
    cdef list slots              # Connection or None, by slot
    cdef list free_slots         # slots to use again
    cdef uint32_t* generations   # times that each slot was used; tells late events
    cdef uint32_t capacity       # of generations
    cdef list deferred           # connections to call when this event is done
    cdef Piece[PIECES] pieces    # writes that are put off until the batch is done
    cdef int piece_count
    cdef char* put               # their bytes
    cdef Py_ssize_t put_size
    cdef bint is_crowded         # several events came at once
    cdef bint is_turning
    cdef bint is_wanted           # the loop has something to do: end the turn
    cdef int alarm                # descriptor of the timer that ends a wait
    cdef double alarm_at          # when it runs out, or a moment that is past
    cdef double gap               # seconds from one turn to the next, on average
    cdef bint is_scheduled
    cdef object on_crash         # called with (connection, exception)

    cdef int tick(self) noexcept
    cdef int handle(self, epoll_event* events, int count) except -1
    cdef int put_off(
        self, Descriptor connection, const char* data, Py_ssize_t size
    ) except -1
    cdef int send_all(self) except -1
    cdef int set_alarm(self) noexcept
    cdef int later(self, Descriptor connection) except -1
    cdef int run_deferred(self) except -1
    cdef int crashed(self, Descriptor connection, object error) except -1


cdef class Descriptor:
    cdef readonly Reactor reactor
    cdef readonly int fd           # -1 when closed
    cdef bint is_hung              # the kernel reports no more: both ways are shut
    cdef bint is_watched           # the reactor hears of its events
    cdef readonly bint is_broken   # the peer is gone; set by reads and writes
    cdef readonly uint64_t bytes_received
    cdef readonly uint64_t bytes_sent
    cdef uint32_t slot
    cdef uint32_t interest         # epoll events asked for
    cdef char* inbox               # bytes read and not yet used
    cdef Py_ssize_t in_size
    cdef Py_ssize_t in_capacity
    cdef char* outbox              # bytes not yet taken by the kernel
    cdef Py_ssize_t out_start
    cdef Py_ssize_t out_size
    cdef Py_ssize_t out_capacity
    cdef readonly object tls       # ssl.SSLObject, or None
    cdef object tls_in
    cdef object tls_out
    cdef object drainer            # future of a coroutine that wants all bytes sent

    cdef int on_event(self, uint32_t events) except -1
    cdef int on_readable(self) except -1
    cdef int on_drained(self) except -1
    cdef int flush_rest(self) except -1
    cdef int on_deferred(self) except -1
    cdef int listen(self, uint32_t events) except -1
    cdef bint is_reading(self) noexcept
    cdef bint is_silent(self) noexcept
    cdef bint is_lendable(self) noexcept
    cdef int pause(self) except -1
    cdef int hold(self) except -1
    cdef int resume(self) except -1
    cdef Py_ssize_t receive(self, char* into, Py_ssize_t size) except -2
    cdef Py_ssize_t receive_raw(self, char* into, Py_ssize_t size) noexcept
    cdef Py_ssize_t fill(self, Py_ssize_t limit) except -2
    cdef int keep(self, const char* data, Py_ssize_t size) except -1
    cdef int consume(self, Py_ssize_t size) noexcept
    cdef int write(self, const char* data, Py_ssize_t size) except -1
    cdef int write_raw(self, const char* data, Py_ssize_t size) except -1
    cdef int flush(self) except -1
    cdef int flush_gather(self) except -1
    cdef int unwatch(self) noexcept
    cdef int shut(self) except -1
    cdef int wake(self) except -1
