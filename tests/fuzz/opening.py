"""What may come before the first packet: a PROXY header, a TLS ClientHello.

Both are looked at whenever more has come, so that what was said of a beginning
must hold for all that begins with it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable

from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol import forwarding, hello
from tests.fuzz.targets import Target

VIOLATION = object()
MAX_PREFIXES = 24


def verdicts(parse: Callable[[bytes], object], data: bytes) -> object:
    """Parse beginnings of `data`, then all; return what was said last."""
    found: object = None
    step = max(1, len(data) // MAX_PREFIXES)
    for end in [*range(1, len(data), step), len(data)]:
        before = found
        try:
            found = parse(data[:end])
        except ProtocolViolation as error:
            assert error.by == "client"
            found = VIOLATION
        assert before in (None, found), (end, before, found)
    return found


def run_forwarding(data: bytes) -> None:
    found = verdicts(forwarding.parse, data)
    if isinstance(found, forwarding.Header):
        assert 0 < found.size <= min(len(data), forwarding.MAX_HEADER_BYTES)
        if found.source:
            assert str(ipaddress.ip_address(found.source)) == found.source
    elif found is None:
        assert len(data) < forwarding.MAX_HEADER_BYTES


def run_hello(data: bytes) -> None:
    found = verdicts(hello.protocols, data)
    if isinstance(found, tuple):
        assert sum(map(len, found)) <= hello.MAX_HELLO_BYTES


def records(handshake: bytes, size: int) -> bytes:
    """The same handshake in records of `size` bytes."""
    return b"".join(
        b"\x16\3\1" + struct.pack(">H", len(part)) + part
        for part in (handshake[at : at + size] for at in range(0, len(handshake), size))
    )


def plain_hello(*extensions: bytes) -> bytes:
    """A ClientHello with little else than these extensions, always the same."""
    joined = b"".join(extensions)
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += struct.pack(">H", len(joined)) + joined
    return b"\1\0" + struct.pack(">H", len(body)) + body


ALPN = b"\0\x10\0\x10\0\x0e\x0apostgresql\2h2"
SNI = b"\0\0\0\x08\0\6\0\0\3a.b"
HELLO_SEEDS = (
    records(plain_hello(SNI, ALPN), 200),
    records(plain_hello(ALPN), 9),
    records(plain_hello(), 60),
    records(plain_hello(SNI)[:-3], 90),
    b"\x16\3\1\0\0",
    b"\x15\3\1\0\2\2\x32",
)
FORWARDING_SEEDS = (
    b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 5432\r\n\0\0\0\x08",
    b"PROXY TCP6 2001:db8::1 ::1 56324 5432\r\n",
    b"PROXY UNKNOWN\r\n",
    b"PROXY TCP4 999.0.0.1 a b c\r\n",
    forwarding.SIGNATURE + b"\x21\x11\0\x0c" + bytes(range(12)) + b"rest",
    forwarding.SIGNATURE + b"\x21\x21\0\x28" + bytes(10) + b"\xff\xff" + bytes(28),
    forwarding.SIGNATURE + b"\x20\0\0\0",
    forwarding.SIGNATURE + b"\x21\x31\0\xd8" + bytes(216),
)
TARGETS = (
    Target(
        "forwarding",
        run_forwarding,
        FORWARDING_SEEDS,
        (b"PROXY ", b"TCP4", b"TCP6", b"UNKNOWN", b"\r\n", b"\x21\x11", b"\x21\x21"),
    ),
    Target("hello", run_hello, HELLO_SEEDS, (ALPN, SNI, b"\x16\3\1", b"\0\x10", b"\1")),
)
