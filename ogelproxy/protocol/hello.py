"""What a TLS client offers to speak, read from its ClientHello.

Python's ssl goes on without a protocol where none of the client's is ours; the
manual (55.2.11) and RFC 7301, section 3.2 want an alert, so the list is read
before OpenSSL gets the bytes. Only the first message of a handshake is read:
nothing in it is secret, and OpenSSL checks all of it again.
"""

from __future__ import annotations

from ogelproxy.errors import ProtocolViolation

#: The name that is registered for the protocol of the manual's chapter 55.
POSTGRESQL = b"postgresql"

#: The first byte of a TLS connection: a record of the handshake (RFC 8446, 5.1).
HANDSHAKE = b"\x16"

#: Most bytes of a ClientHello; real ones are below 2,000.
MAX_HELLO_BYTES = 16_384

#: Fatal alerts as a server sends them before it has chosen a version
#: (RFC 8446, section 6).
DECODE_ERROR = b"\x15\x03\x01\x00\x02\x02\x32"
NO_APPLICATION_PROTOCOL = b"\x15\x03\x01\x00\x02\x02\x78"

CLIENT_HELLO = 1
ALPN = 16


def protocols(data: bytes) -> tuple[bytes, ...] | None:
    """Return the names that the client offers (ALPN), or None when more must come.

    `data` is what the client has sent from its first record on. Raises
    ProtocolViolation when it is no ClientHello.
    """
    hello = _message(data)
    if hello is None:
        return None
    fields = _Reader(hello)
    fields.take(2 + 32)  # version and random
    fields.vector(1)  # session
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression
    if fields.is_empty:
        return ()
    extensions = _Reader(fields.vector(2))
    while not extensions.is_empty:
        kind = int.from_bytes(extensions.take(2), "big")
        body = extensions.vector(2)
        if kind == ALPN:
            return _names(_Reader(body).vector(2))
    return ()


def _message(data: bytes) -> bytes | None:
    """Join the ClientHello's records (RFC 8446, sections 4 and 5.1)."""
    joined = b""
    at = 0
    while True:
        head = data[at : at + 5]
        if head[:1] not in (b"", HANDSHAKE):
            raise ProtocolViolation("expected a TLS handshake")
        if len(head) < 5:
            return None
        size = int.from_bytes(head[3:], "big")
        if not size or len(joined) + size > MAX_HELLO_BYTES:
            raise ProtocolViolation("impossible length of a TLS record")
        part = data[at + 5 : at + 5 + size]
        if len(part) < size:
            return None
        joined += part
        at += 5 + size
        if joined[0] != CLIENT_HELLO:
            raise ProtocolViolation("expected a ClientHello")
        if len(joined) < 4:
            continue
        end = 4 + int.from_bytes(joined[1:4], "big")
        if end > MAX_HELLO_BYTES:
            raise ProtocolViolation("ClientHello is too long")
        if len(joined) >= end:
            return joined[4:end]


def _names(body: bytes) -> tuple[bytes, ...]:
    names = []
    reader = _Reader(body)
    while not reader.is_empty:
        names.append(reader.vector(1))
    return tuple(names)


class _Reader:
    """Takes fields off the front of `data` (RFC 8446, section 3)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise ProtocolViolation("ClientHello ends early")
        self._at += size
        return taken

    def vector(self, size: int) -> bytes:
        """Take what has its length, of `size` bytes, in front of it."""
        return self.take(int.from_bytes(self.take(size), "big"))
