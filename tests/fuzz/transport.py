"""What may come before a first packet: a balancer's header, a TLS ClientHello."""

from __future__ import annotations

import ipaddress
import ssl
import struct

from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol import forwarding, hello
from tests.fuzz.targets import Target

SIGNATURE = forwarding.SIGNATURE
V4 = bytes([203, 0, 113, 9, 192, 0, 2, 1]) + struct.pack(">HH", 50_000, 5432)
V6 = bytes(range(32)) + struct.pack(">HH", 50_000, 5432)
HEADERS = (
    SIGNATURE + struct.pack(">BBH", 0x21, 0x11, len(V4)) + V4,
    SIGNATURE + struct.pack(">BBH", 0x21, 0x21, len(V6)) + V6,
    SIGNATURE + struct.pack(">BBH", 0x21, 0x31, 216) + bytes(216),
    SIGNATURE + struct.pack(">BBH", 0x20, 0, 7) + b"\x03\0\4abcd",
    b"PROXY TCP4 203.0.113.9 192.0.2.1 50000 5432\r\n",
    b"PROXY TCP6 2001:db8::9 ::1 50000 5432\r\n",
    b"PROXY UNKNOWN\r\n",
)
HEADER_WORDS = (SIGNATURE, b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"\r\n", b"::")


def forward(data: bytes) -> None:
    """Read a balancer's header; no shorter beginning may read as another."""
    try:
        found = forwarding.parse(data)
    except ProtocolViolation as error:
        assert error.by == "client"
        return
    if found is None:
        assert len(data) < forwarding.MAX_HEADER_BYTES
        return
    assert 0 < found.size <= min(len(data), forwarding.MAX_HEADER_BYTES)
    if found.source:
        assert str(ipaddress.ip_address(found.source)) == found.source
    assert forwarding.parse(data[: found.size]) == found
    assert forwarding.parse(data[: found.size - 1]) is None


def client_hello(*names: str) -> bytes:
    """The ClientHello that OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if names:
        context.set_alpn_protocols(list(names))
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return sent.read()
    raise AssertionError("a handshake without a server")


#: A hello of the fewest bytes, in one record and in two.
SHORTEST = b"\x03\x03" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
OFFER = b"\0\x10\0\x0d\0\x0b\x0apostgresql"
BODY = b"\1\0" + struct.pack(">H", len(SHORTEST) + 2 + len(OFFER)) + SHORTEST
BODY += struct.pack(">H", len(OFFER)) + OFFER
HELLOS = (
    client_hello("h2", "postgresql"),
    client_hello("postgresql"),
    client_hello(),
    b"\x16\3\1" + struct.pack(">H", len(BODY)) + BODY,
    b"\x16\3\1\0\2"
    + BODY[:2]
    + b"\x16\3\1"
    + struct.pack(">H", len(BODY) - 2)
    + BODY[2:],
)
HELLO_WORDS = (b"\x16\3\1", b"\0\x10", b"\x0apostgresql", b"\1\0", b"\xff\xff")


def greet(data: bytes) -> None:
    """Read a ClientHello; no shorter beginning may read as another."""
    try:
        found = hello.protocols(data)
    except ProtocolViolation as error:
        assert error.by == "client"
        return
    if found is None:
        return
    assert sum(map(len, found)) < len(data)
    assert hello.protocols(data + b"\x16") == found


TARGETS = (
    Target("forwarding", forward, HEADERS, HEADER_WORDS),
    Target("hello", greet, HELLOS, HELLO_WORDS, max_bytes=1024),
)
