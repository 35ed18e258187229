"""Loops around the compiled parts, in C, as the proxy calls them.

From Python a call costs more than what is measured here, so the loop is compiled
too. It derives from the proxy's own classes and overrides only what would leave
them: nothing is sent, and no request is understood further than a case needs.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

from ogelproxy._bucket cimport TokenBucket
from ogelproxy._client cimport ClientCore
from ogelproxy._fingerprint cimport Scan, scan_feed, scan_finish, scan_start
from ogelproxy._replies cimport ASKED_QUERY, REPLY_FORWARD, Reply
from ogelproxy._connection cimport Connection
from ogelproxy._reactor cimport Reactor
from ogelproxy._server cimport ServerCore

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void* into, size_t size, int flags)
    ssize_t send(int fd, const void* data, size_t size, int flags)
    enum:
        MSG_DONTWAIT

cdef extern from "sys/epoll.h" nogil:
    enum:
        EPOLLIN

cdef enum:
    MAX_PASSED = 4096  # bytes of a request or an answer that is passed on

cdef extern from *:
    # Without valgrind's header the loops can be timed, and not counted.
    """
    #if defined(__has_include)
    #if __has_include(<valgrind/callgrind.h>)
    #include <valgrind/callgrind.h>
    #endif
    #endif
    #ifndef CALLGRIND_DUMP_STATS_AT
    #define RUNNING_ON_VALGRIND 0
    #define CALLGRIND_START_INSTRUMENTATION
    #define CALLGRIND_ZERO_STATS
    #define CALLGRIND_DUMP_STATS_AT(name) (void) (name)
    #endif
    static void count_from_here(void) {
        CALLGRIND_START_INSTRUMENTATION;
        CALLGRIND_ZERO_STATS;
    }
    static void count_to_here(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
    static int is_counted(void) { return RUNNING_ON_VALGRIND; }
    """
    void count_from_here()
    void count_to_here(const char* name)
    bint is_counted()


cdef class Loop:

    def __call__(self, uint64_t count):
        self.run(count)

    def instructions(self, uint64_t count):
        if not is_counted():
            raise RuntimeError("instructions are counted under callgrind only")
        # What is done once, or the first time, is none of it.
        self.run(count)
        count_from_here()
        self.run(count)
        count_to_here(b"once")
        self.run(2 * count)
        count_to_here(b"twice")

    cdef int run(self, uint64_t count) except -1:
        return 0


cdef class Nothing(Loop):

    cdef int nothing(self) except -1:
        return 0

    cdef int run(self, uint64_t count) except -1:
        for _ in range(count):
            self.nothing()
        return 0


cdef class Scans(Loop):
    cdef bytes text
    cdef Scan scan

    def __init__(self, bytes text not None):
        self.text = text

    @property
    def fingerprint(self):
        return self.scan.fingerprint

    cdef int run(self, uint64_t count) except -1:
        cdef const char* text = PyBytes_AS_STRING(self.text)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.text)
        for _ in range(count):
            scan_start(&self.scan)
            scan_feed(&self.scan, text, size)
            scan_finish(&self.scan)
        return 0


cdef class Takes(Loop):
    cdef readonly TokenBucket bucket
    cdef double now
    cdef double step

    def __init__(self, TokenBucket bucket not None, double now, double step):
        self.bucket = bucket
        self.now = now
        self.step = step

    cdef int run(self, uint64_t count) except -1:
        for _ in range(count):
            self.now += self.step
            self.bucket.take(self.now, 1)
        return 0


cdef class QuietClient(ClientCore):

    cdef Py_ssize_t request(
        self, char kind, const char* p, Py_ssize_t size, Py_ssize_t have
    ) except -1:
        return self.forward(p, size, have)

    cdef int flush_requests(self) except -1:
        self.reactor.gather.clear()
        return 0

    cdef int flush_gather(self) except -1:
        self.reactor.gather.clear()
        return 0

    def meet(self, QuietServer server not None):
        server.lend(self)


cdef class QuietServer(ServerCore):
    cdef public bint is_counting

    cdef void count(self, Reply* reply) noexcept:
        if self.is_counting:
            ServerCore.count(self, reply)


cdef class Requests(Loop):
    cdef QuietClient client
    cdef bytes data

    def __init__(self, QuietClient client not None, bytes data not None):
        self.client = client
        self.data = data

    cdef int run(self, uint64_t count) except -1:
        cdef const char* data = PyBytes_AS_STRING(self.data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.data)
        for _ in range(count):
            if self.client.process(data, size) != size:
                raise RuntimeError("not all of the requests was used")
        return 0


cdef class Answers(Loop):
    cdef QuietServer server
    cdef bytes data
    cdef bytes asked

    def __init__(
        self, QuietServer server not None, bytes data not None, bytes asked not None
    ):
        self.server = server
        self.data = data
        self.asked = asked

    cdef int run(self, uint64_t count) except -1:
        cdef const char* data = PyBytes_AS_STRING(self.data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.data)
        cdef uint8_t asked
        for _ in range(count):
            for asked in self.asked:
                self.server.replies.push(asked, REPLY_FORWARD)
            if self.server.process(data, size) != size or self.server.replies.count:
                raise RuntimeError("not all of the answers was used")
        return 0


cdef class Pays(Loop):
    cdef QuietClient client

    def __init__(self, QuietClient client not None):
        self.client = client

    cdef int run(self, uint64_t count) except -1:
        for _ in range(count):
            self.client.pay(1)
        return 0


cdef class Counts(Loop):
    cdef QuietServer server
    cdef uint64_t fingerprints

    def __init__(self, QuietServer server not None, uint64_t fingerprints):
        self.server = server
        self.fingerprints = fingerprints
        server.is_counting = True

    cdef int run(self, uint64_t count) except -1:
        cdef uint64_t number
        cdef Reply* reply
        for number in range(count):
            reply = self.server.replies.push(ASKED_QUERY, REPLY_FORWARD)
            # Hashes are spread, as those of the scan are.
            reply.fingerprint = (
                1 + number % self.fingerprints
            ) * <uint64_t> 0x9E3779B97F4A7C15
            reply.queries = 1
            reply.complexity = 100
            reply.bytes_in = 60
            reply.rows = 1
            reply.started = self.server.reactor.now
            self.server.bytes_out = 120
            self.server.count(reply)
            self.server.replies.pop()
        return 0


cdef class Queries(Loop):
    """Whole queries, by sockets whose far ends are held here."""

    cdef Connection client
    cdef int client_end
    cdef Connection server
    cdef int server_end
    cdef bytes request
    cdef bytes passed
    cdef bytes answer

    def __init__(
        self, Connection client not None, int client_end,
        Connection server not None, int server_end,
        bytes request not None, bytes passed not None, bytes answer not None,
    ):
        if max(len(passed), len(answer)) > MAX_PASSED:
            raise ValueError("too long to be passed on here")
        self.client = client
        self.client_end = client_end
        self.server = server
        self.server_end = server_end
        self.request = request
        self.passed = passed
        self.answer = answer

    cdef int run(self, uint64_t count) except -1:
        for _ in range(count):
            send_all(self.client_end, self.request)
            self.handle(self.client)
            receive_all(self.server_end, self.passed)
            send_all(self.server_end, self.answer)
            self.handle(self.server)
            receive_all(self.client_end, self.answer)
        return 0

    cdef int handle(self, Connection connection) except -1:
        """As a turn of the reactor does, which may wait for more than is to come."""
        cdef Reactor reactor = connection.reactor
        reactor.tick()
        reactor.gather.clear()
        connection.on_event(EPOLLIN)
        if reactor.deferred:
            reactor.run_deferred()
        return 0


cdef int send_all(int fd, bytes data) except -1:
    if send(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), 0) < 0:
        raise OSError("nothing could be sent")
    return 0


cdef int receive_all(int fd, bytes data) except -1:
    cdef char[MAX_PASSED] into
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    if recv(fd, into, size, MSG_DONTWAIT) != size or (
        memcmp(into, PyBytes_AS_STRING(data), size) != 0
    ):
        raise RuntimeError("something else was passed on")
    return 0
