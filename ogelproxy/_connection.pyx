"""A connection as coroutines use it: to log in, and for what leaves the fast path.

They take messages one by one and wait for more, while the reactor reads. What is done
per query knows nothing of them.
"""

import ssl

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from ogelproxy._kernel cimport SHUT_WR, shutdown
from ogelproxy._wire cimport HEADER, frame_size
from ogelproxy.errors import ProtocolViolation


cdef class More:
    def __await__(self):
        return iter((self,))


MORE = More()


cdef class Connection(Descriptor):

    cdef int wake(self) except -1:
        reader = self.reader
        if reader is not None:
            self.reader = None
            if reader is not MORE:
                if not reader.done():
                    reader.set_result(None)
                    self.reactor.is_wanted = True
            elif self.stepper is not None:  # it did not stop waiting
                self.stepper()
        return 0

    @property
    def is_closed(self):
        return self.fd < 0

    @property
    def unsent(self):
        return self.out_size

    def more(self):
        """Return what is done once there is more to take, or no peer."""
        if self.stepper is not None and self.fd >= 0 and not self.is_broken:
            self.reader = MORE
            self.resume()
            return MORE
        future = self.reactor.loop.create_future()
        if self.is_broken or self.fd < 0:
            future.set_exception(ConnectionResetError("the peer is gone"))
        else:
            self.reader = future
            self.resume()
        return future

    def peek(self):
        return PyBytes_FromStringAndSize(self.inbox, self.in_size)

    def take(self, Py_ssize_t size):
        """Take exactly `size` bytes, or None while there are fewer."""
        if self.in_size < size:
            return None
        data = PyBytes_FromStringAndSize(self.inbox, size)
        self.consume(size)
        return data

    def take_message(self, Py_ssize_t limit):
        """Take one message as (type, body), or None while it isn't whole."""
        cdef Py_ssize_t size
        if self.in_size < HEADER:
            return None
        size = frame_size(self.inbox, limit)
        if size < 0:
            raise ProtocolViolation("impossible message length")
        if self.in_size < size:
            return None
        kind = self.inbox[:1]
        body = self.inbox[HEADER:size]
        self.consume(size)
        return kind, body

    def send(self, bytes data):
        self.write(PyBytes_AS_STRING(data), len(data))

    def drained(self):
        """Return a future that is done once all is sent, or the peer is gone."""
        future = self.reactor.loop.create_future()
        if self.out_size == 0 or self.fd < 0:
            future.set_result(None)
        else:
            self.drainer = future
        return future

    def end_output(self):
        if self.fd >= 0:
            self.reactor.send_all()
            shutdown(self.fd, SHUT_WR)

    def close(self):
        self.shut()

    async def start_tls(self, context, *, server_side, server_hostname=None):
        """Put TLS between this connection and its peer (PEP 748's memory form)."""
        incoming = ssl.MemoryBIO()
        outgoing = ssl.MemoryBIO()
        tls = context.wrap_bio(
            incoming, outgoing, server_side=server_side, server_hostname=server_hostname
        )
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
            finally:
                raw = outgoing.read()
                self.write_raw(PyBytes_AS_STRING(raw), len(raw))
            while self.in_size == 0:
                await self.more()
            incoming.write(self.take(self.in_size))
        self.tls = tls
        self.tls_in = incoming
        self.tls_out = outgoing
        if self.in_size:
            incoming.write(self.take(self.in_size))
        self.reactor.later(self)
