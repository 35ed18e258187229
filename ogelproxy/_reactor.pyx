"""Descriptors and the events on them: Reactor and Descriptor.

The event loop watches one descriptor, an epoll of ours that holds every
connection. One wake-up of the loop so handles all connections that are ready,
in compiled code, whichever loop it is; nothing of asyncio is touched per
message. A Descriptor knows what was read and not used, and what was written and not
sent; it knows no protocol. `_connection` derives from it what coroutines use.
"""

import ssl

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

from ogelproxy._kernel cimport (
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLERR, EPOLLET,
    EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, MSG_NOSIGNAL, MSG_PEEK, TFD_CLOEXEC,
    TFD_NONBLOCK, epoll_create1, epoll_ctl, epoll_event, epoll_wait, itimerspec,
    recv, send, timerfd_create, timerfd_settime,
)
from ogelproxy.errors import ProtocolViolation


cdef enum:
    EVENTS = 256      # events taken from the kernel at once
    KEPT = 4096       # bytes of an empty buffer that is kept for the next use
    STREAM = 8192     # bytes of a read that is one of many: Postgres's send buffer
    SMALL = 2048      # bytes of a write up to which it is put off, see `put_off`

cdef uint64_t ALARM = <uint64_t> -1  # tells the timer's events from connections'
# Seconds for which a busy turn goes on.
cdef double LINGER = 0.001
# Seconds between turns, on average, up to which the reactor is busy; and as how many
# the longest counts.
cdef double BUSY = 0.0003
cdef double LONG = 0.01


cdef class Reactor:

    def __cinit__(self):
        self.epoll = self.alarm = -1
        self.scratch = <char*> malloc(SCRATCH)
        self.put = <char*> malloc(SCRATCH)
        self.capacity = 64
        self.generations = <uint32_t*> malloc(self.capacity * sizeof(uint32_t))
        if self.scratch == NULL or self.put == NULL or self.generations == NULL:
            raise MemoryError
        self.gather = Gather()
        self.slots = []
        self.free_slots = []
        self.deferred = []

    def __init__(self, loop, on_crash):
        self.loop = loop
        cdef epoll_event event
        self.on_crash = on_crash
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, "epoll_create1")
        self.alarm = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        # It tells of each time that it runs out once, without being read.
        event.events = EPOLLIN | EPOLLET
        event.data.u64 = ALARM
        if self.alarm < 0 or epoll_ctl(
            self.epoll, EPOLL_CTL_ADD, self.alarm, &event
        ) < 0:
            raise OSError(errno, "timerfd_create")
        self.tick()
        self.gap = LONG
        loop.add_reader(self.epoll, self.turn)

    def __dealloc__(self):
        if self.epoll >= 0:
            close(self.epoll)
        if self.alarm >= 0:
            close(self.alarm)
        free(self.scratch)
        free(self.put)
        free(self.generations)

    def stop(self):
        if self.epoll >= 0:
            self.loop.remove_reader(self.epoll)
            close(self.epoll)
            self.epoll = -1

    @property
    def connections(self):
        return [each for each in self.slots if each is not None]

    cdef int tick(self) noexcept:
        cdef timespec at
        clock_gettime(CLOCK_MONOTONIC, &at)
        self.now = <double> at.tv_sec + <double> at.tv_nsec * 1e-9
        return 0

    def turn(self):
        """Handle the connections that are ready and, under load, those that are next.

        Where queries are under way the next event comes within microseconds, and a
        way through the loop for each costs as much as a system call. So a busy turn
        waits for events itself, for LINGER; whatever else the loop has to do is that
        much later, unless it is known of (`leave`).
        """
        cdef epoll_event events[EVENTS]
        cdef int count
        cdef double end
        cdef double last = self.now
        self.is_turning = True
        try:
            count = epoll_wait(self.epoll, events, EVENTS, 0)
            self.tick()
            self.gap += (min(self.now - last, LONG) - self.gap) / 8
            end = self.now + LINGER
            while count > 0:
                self.handle(events, count)
                if (
                    self.gap > BUSY or self.now >= end
                    or self.is_wanted or self.deferred
                ):
                    break
                self.set_alarm()
                with nogil:
                    count = epoll_wait(self.epoll, events, EVENTS, -1)
                self.tick()
        finally:
            self.is_turning = self.is_wanted = False
            if self.deferred:
                self.schedule()

    cdef int handle(self, epoll_event* events, int count) except -1:
        cdef int index = 0
        cdef epoll_event* event
        cdef uint32_t slot
        cdef Descriptor connection
        self.is_crowded = count > 1
        while index < count:
            # To handle exceptions costs something, also where none comes: what one
            # event raises ends the loop within, not this one.
            try:
                while index < count:
                    event = &events[index]
                    index += 1
                    if event.data.u64 == ALARM:
                        self.alarm_at = 0
                        self.is_wanted = True
                        continue
                    slot = <uint32_t> event.data.u64
                    # An earlier event may have closed this connection, and a new
                    # one may already sit in its slot.
                    if event.data.u64 >> 32 != self.generations[slot]:
                        continue
                    connection = self.slots[slot]
                    if connection is None:
                        continue
                    # Whatever an earlier event left there is nobody else's.
                    self.gather.clear()
                    connection.on_event(event.events)
                    if self.deferred:
                        self.run_deferred()
            except Exception as error:
                self.crashed(connection, error)
        self.is_crowded = False
        return self.send_all()

    cdef int put_off(
        self, Descriptor connection, const char* data, Py_ssize_t size
    ) except -1:
        """Send a little at the end of the batch of events.

        The kernel's code and ours drive each other out of the processor's caches.
        Where several connections are ready, all sending at once costs less.
        """
        cdef Piece* piece
        if self.piece_count == PIECES or self.put_size + size > SCRATCH:
            self.send_all()
        piece = &self.pieces[self.piece_count]
        piece.connection = <PyObject*> connection
        piece.at = self.put_size
        piece.size = size
        memcpy(self.put + self.put_size, data, size)
        self.put_size += size
        self.piece_count += 1
        return 0

    cdef int send_all(self) except -1:
        """Send what was put off, in its order."""
        cdef int count = self.piece_count
        cdef int index
        cdef Piece* piece
        self.piece_count = 0
        self.put_size = 0
        for index in range(count):
            piece = &self.pieces[index]
            # It is open: nothing is closed before this was called.
            (<Descriptor> piece.connection).write_raw(self.put + piece.at, piece.size)
        return 0

    cdef int set_alarm(self) noexcept:
        """Have an event end a wait that no other ends, LINGER from now."""
        # Once for many waits: a timeout of each would set the kernel's timer anew.
        cdef itimerspec when
        if self.alarm_at < self.now:
            memset(&when, 0, sizeof(when))
            when.it_value.tv_nsec = <long> (LINGER * 1e9)
            timerfd_settime(self.alarm, 0, &when, NULL)
            self.alarm_at = self.now + LINGER
        return 0

    def leave(self):
        """End the turn after this event: the loop has something to do."""
        self.is_wanted = True

    cdef int later(self, Descriptor connection) except -1:
        """Have `connection.on_deferred` called once the present event is done."""
        self.deferred.append(connection)
        if not self.is_turning:
            self.schedule()
        return 0

    def schedule(self):
        if not self.is_scheduled:
            self.is_scheduled = True
            self.loop.call_soon(self.run_scheduled)

    def run_scheduled(self):
        self.is_scheduled = False
        self.is_turning = True
        try:
            self.tick()
            self.run_deferred()
        finally:
            self.is_turning = False

    cdef int run_deferred(self) except -1:
        cdef Descriptor connection
        cdef int budget = 64
        while self.deferred and budget > 0:
            budget -= 1
            connection = self.deferred.pop(0)
            self.gather.clear()
            try:
                if connection.fd >= 0:
                    connection.on_deferred()
            except Exception as error:
                self.crashed(connection, error)
        if self.deferred:
            self.schedule()
        return 0

    cdef int crashed(self, Descriptor connection, object error) except -1:
        if isinstance(error, ProtocolViolation):
            # What came before it is good, and counted as sent.
            connection.flush_rest()
        self.gather.clear()
        self.on_crash(connection, error)
        return 0


cdef class Descriptor:

    def __init__(self, Reactor reactor, int fd):
        cdef uint32_t* grown
        cdef epoll_event event
        self.reactor = reactor
        self.fd = fd
        if reactor.free_slots:
            self.slot = reactor.free_slots.pop()
            reactor.slots[self.slot] = self
        else:
            self.slot = <uint32_t> len(reactor.slots)
            if self.slot == reactor.capacity:
                grown = <uint32_t*> realloc(
                    reactor.generations, reactor.capacity * 2 * sizeof(uint32_t)
                )
                if grown == NULL:
                    raise MemoryError
                reactor.generations = grown
                reactor.capacity *= 2
            reactor.generations[self.slot] = 0
            reactor.slots.append(self)
        self.interest = EPOLLIN
        event.events = EPOLLIN
        event.data.u64 = (
            <uint64_t> reactor.generations[self.slot] << 32 | self.slot
        )
        if epoll_ctl(reactor.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
        self.is_watched = True

    def __dealloc__(self):
        free(self.inbox)
        free(self.outbox)
        if self.fd >= 0:
            close(self.fd)

    # Events.

    cdef int on_event(self, uint32_t events) except -1:
        if events & (EPOLLHUP | EPOLLERR):
            self.is_hung = True
        if events & EPOLLOUT:
            self.flush()
        if self.fd >= 0 and events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.on_readable()
        return 0

    cdef int on_readable(self) except -1:
        # Without a protocol of its own a connection collects bytes for the
        # coroutine that logs it in, and no more than that one message may take.
        cdef Py_ssize_t got = 1
        if self.in_size < SCRATCH:
            got = self.fill(SCRATCH)
        else:
            self.pause()
        if got < 0 or self.is_broken or self.is_hung:
            # The kernel would report it again and again until it is closed.
            self.is_broken = True
            self.unwatch()
        elif got == 0:
            return 0  # who waits in TLS would at once have it asked for again
        return self.wake()

    cdef int on_drained(self) except -1:
        return 0

    cdef int flush_rest(self) except -1:
        """Send what the gather holds to whom it is for, before it is cleared."""
        return 0

    cdef int on_deferred(self) except -1:
        # Paused, TLS waits as the kernel does; resume() defers again.
        return self.on_readable() if self.is_reading() else 0

    cdef int wake(self) except -1:
        """Have a coroutine that waits for more go on, if there is one."""
        return 0

    cdef int listen(self, uint32_t events) except -1:
        cdef epoll_event event
        if self.interest == events or not self.is_watched:
            return 0
        event.events = events
        event.data.u64 = (
            <uint64_t> self.reactor.generations[self.slot] << 32 | self.slot
        )
        if epoll_ctl(self.reactor.epoll, EPOLL_CTL_MOD, self.fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
        self.interest = events
        return 0

    cdef bint is_reading(self) noexcept:
        return self.interest & EPOLLIN != 0

    cdef bint is_silent(self) noexcept:
        """Whether nothing came that is not yet read, not even the end."""
        cdef char byte
        return recv(self.fd, &byte, 1, MSG_PEEK) < 0 and errno == EAGAIN

    cdef bint is_lendable(self) noexcept:
        return True

    cdef int pause(self) except -1:
        return self.listen(self.interest & ~<uint32_t> (EPOLLIN | EPOLLRDHUP))

    cdef int hold(self) except -1:
        """Pause, but notice a peer that goes away meanwhile."""
        return self.listen(self.interest & ~<uint32_t> EPOLLIN | EPOLLRDHUP)

    cdef int resume(self) except -1:
        self.listen(self.interest & ~<uint32_t> EPOLLRDHUP | EPOLLIN)
        if self.tls is not None:
            # What TLS already took from the kernel makes no further event.
            self.reactor.later(self)
        return 0

    # Reading.

    cdef Py_ssize_t receive_raw(self, char* into, Py_ssize_t size) noexcept:
        """Bytes read; 0 when there are none now; -1 when the peer is gone."""
        cdef ssize_t got
        while True:
            got = recv(self.fd, into, size, 0)
            if got > 0:
                self.bytes_received += got
                if got >= STREAM:
                    # What comes in a stream costs least in large parts: a way
                    # through the loop lets them grow.
                    self.reactor.is_wanted = True
                return got
            if got == 0:
                return -1
            if errno == EAGAIN:
                return 0
            if errno != EINTR:
                return -1

    cdef Py_ssize_t receive(self, char* into, Py_ssize_t size) except -2:
        cdef Py_ssize_t raw
        if self.tls is None:
            return self.receive_raw(into, size)
        raw = self.receive_raw(into, size)
        if raw > 0:
            self.tls_in.write(PyBytes_FromStringAndSize(into, raw))
        try:
            got = self.tls.read(size, PyMemoryView_FromMemory(into, size, PyBUF_WRITE))
        except ssl.SSLWantReadError:
            return -1 if raw < 0 else 0
        except ssl.SSLError:
            return -1
        if got == 0:
            return -1
        self.reactor.later(self)  # further records may lie decrypted or buffered
        return got

    cdef Py_ssize_t fill(self, Py_ssize_t limit) except -2:
        """Read into the inbox until it holds `limit` bytes, at most one read."""
        cdef Py_ssize_t room = self.in_capacity - self.in_size
        cdef Py_ssize_t want
        cdef Py_ssize_t got
        cdef char* grown
        if room < 1024:
            want = max(self.in_capacity * 2, 2048)
            grown = <char*> realloc(self.inbox, want)
            if grown == NULL:
                raise MemoryError
            self.inbox = grown
            self.in_capacity = want
            room = want - self.in_size
        got = self.receive(self.inbox + self.in_size, min(room, limit))
        if got > 0:
            self.in_size += got
        return got

    cdef int keep(self, const char* data, Py_ssize_t size) except -1:
        """Put bytes that were read elsewhere into the (empty) inbox."""
        cdef char* grown
        if self.in_capacity < size:
            grown = <char*> realloc(self.inbox, size)
            if grown == NULL:
                raise MemoryError
            self.inbox = grown
            self.in_capacity = size
        memcpy(self.inbox, data, size)
        self.in_size = size
        return 0

    cdef int consume(self, Py_ssize_t size) noexcept:
        self.in_size -= size
        if self.in_size:
            memmove(self.inbox, self.inbox + size, self.in_size)
        else:
            # An idle connection owns no buffer.
            free(self.inbox)
            self.inbox = NULL
            self.in_capacity = 0
        return 0

    # Writing.

    cdef int write(self, const char* data, Py_ssize_t size) except -1:
        """Send `data`, keeping what the kernel doesn't take.

        A peer that is gone is noticed by the next read, not here.
        """
        if self.fd < 0 or size == 0:
            return 0
        if self.tls is None:
            return self.write_raw(data, size)
        try:
            self.tls.write(PyMemoryView_FromMemory(<char*> data, size, PyBUF_READ))
        except ssl.SSLError:
            return 0
        raw = self.tls_out.read()
        return self.write_raw(PyBytes_AS_STRING(raw), len(raw))

    cdef int write_raw(self, const char* data, Py_ssize_t size) except -1:
        cdef ssize_t sent = 0
        cdef char* grown
        cdef Py_ssize_t need
        if self.reactor.piece_count:
            self.reactor.send_all()
        if self.fd < 0:
            return 0
        self.bytes_sent += size
        if self.out_size == 0:
            while True:
                sent = send(self.fd, data, size, MSG_NOSIGNAL)
                if sent == size:
                    return 0
                if sent >= 0:
                    break
                if errno == EAGAIN:
                    sent = 0
                    break
                if errno != EINTR:
                    return 0
        need = self.out_size + size - sent
        if self.out_start + need > self.out_capacity:
            if self.out_start:
                memmove(self.outbox, self.outbox + self.out_start, self.out_size)
                self.out_start = 0
            if need > self.out_capacity:
                grown = <char*> realloc(self.outbox, need * 2)
                if grown == NULL:
                    raise MemoryError
                self.outbox = grown
                self.out_capacity = need * 2
        memcpy(self.outbox + self.out_start + self.out_size, data + sent, size - sent)
        self.out_size = need
        return self.listen(self.interest | EPOLLOUT)

    cdef int flush(self) except -1:
        """Send what waits; call on_drained when nothing is left."""
        cdef ssize_t sent
        while self.out_size:
            sent = send(
                self.fd, self.outbox + self.out_start, self.out_size, MSG_NOSIGNAL
            )
            if sent < 0:
                if errno == EINTR:
                    continue
                if errno == EAGAIN:
                    return 0
                self.out_size = 0
                break
            self.out_start += sent
            self.out_size -= sent
        self.out_start = 0
        if self.out_capacity > KEPT:
            free(self.outbox)
            self.outbox = NULL
            self.out_capacity = 0
        self.listen(self.interest & ~<uint32_t> EPOLLOUT)
        if self.drainer is not None:
            if not self.drainer.done():
                self.drainer.set_result(None)
                self.reactor.is_wanted = True
            self.drainer = None
        return self.on_drained()

    cdef int flush_gather(self) except -1:
        """Send what the reactor's gather holds."""
        cdef Gather gather = self.reactor.gather
        cdef const char* data = gather.run
        cdef Py_ssize_t size = gather.run_size
        if gather.size:
            gather.reserve(0)
            data = gather.buffer
            size = gather.size
        if (
            self.reactor.is_crowded and 0 < size <= SMALL
            and self.fd >= 0 and self.tls is None
        ):
            self.reactor.put_off(self, data, size)
        elif size:
            self.write(data, size)
        gather.clear()
        return 0

    cdef int unwatch(self) noexcept:
        """Hear of no more events; the descriptor stays open."""
        if self.is_watched:
            self.is_watched = False
            if self.reactor.epoll >= 0:
                epoll_ctl(self.reactor.epoll, EPOLL_CTL_DEL, self.fd, NULL)
        return 0

    cdef int shut(self) except -1:
        """Close the descriptor and leave the reactor."""
        cdef Reactor reactor = self.reactor
        if self.fd < 0:
            return 0
        if reactor.piece_count:
            reactor.send_all()
        self.unwatch()
        close(self.fd)
        self.fd = -1
        self.is_broken = True
        reactor.slots[self.slot] = None
        reactor.generations[self.slot] += 1
        reactor.free_slots.append(self.slot)
        self.out_size = 0
        if self.drainer is not None and not self.drainer.done():
            self.drainer.set_result(None)
            self.reactor.is_wanted = True
        return self.wake()
