"""PROXY protocol headers, as haproxy's doc/proxy-protocol.txt has them."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol.forwarding import MAX_HEADER_BYTES, SIGNATURE, Header, parse

LOCAL, FORWARDED = 0x20, 0x21
UNSPECIFIED, TCP4, UDP4, TCP6, UNIX = 0x00, 0x11, 0x12, 0x21, 0x31


def binary(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack(">BBH", command, family, len(body)) + body


def inet(source: str) -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    packed = socket.inet_pton(family, source)
    return packed + packed + struct.pack(">HH", 50_000, 5432)


EXTENSION = b"\x03\0\4abcd"

HEADERS = {
    binary(FORWARDED, TCP4, inet("203.0.113.9")): (True, "203.0.113.9"),
    binary(FORWARDED, TCP4, inet("203.0.113.9") + EXTENSION): (True, "203.0.113.9"),
    binary(FORWARDED, TCP6, inet("2001:db8::9")): (True, "2001:db8::9"),
    binary(FORWARDED, TCP6, inet("::ffff:203.0.113.9")): (True, "203.0.113.9"),
    binary(FORWARDED, UNIX, bytes(216)): (True, ""),
    binary(FORWARDED, UNSPECIFIED, b""): (True, ""),
    binary(FORWARDED, UNSPECIFIED, EXTENSION): (True, ""),
    binary(LOCAL, UNSPECIFIED, b""): (False, ""),
    binary(LOCAL, TCP4, inet("203.0.113.9")): (False, ""),
    b"PROXY TCP4 203.0.113.9 192.0.2.1 50000 5432\r\n": (True, "203.0.113.9"),
    b"PROXY TCP6 2001:db8::9 2001:db8::1 50000 5432\r\n": (True, "2001:db8::9"),
    b"PROXY UNKNOWN\r\n": (True, ""),
    b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n": (True, ""),
}


@pytest.mark.parametrize("data", HEADERS, ids=repr)
def test_header_is_read_wherever_it_is_cut(data: bytes) -> None:
    for size in range(len(data)):
        assert parse(data[:size]) is None
    is_forwarded, source = HEADERS[data]
    for rest in (b"", b"\0\0\0\x08", data):
        assert parse(data + rest) == Header(len(data), is_forwarded, source)


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\x16\x03\x01",
        b"\0\0\0\x4e\0\3\0\0user\0",
        SIGNATURE[:11] + b"x",
        binary(0x11, TCP4, inet("203.0.113.9")),
        binary(0x22, TCP4, inet("203.0.113.9")),
        binary(FORWARDED, UDP4, inet("203.0.113.9")),
        binary(FORWARDED, 0x41, bytes(100)),
        binary(FORWARDED, TCP4, inet("203.0.113.9")[:-1]),
        binary(FORWARDED, TCP6, inet("203.0.113.9")),
        SIGNATURE + struct.pack(">BBH", FORWARDED, TCP4, MAX_HEADER_BYTES),
        b"PROXY \r\n",
        b"PROXYTCP4",
        b"proxy TCP4",
        b"PROXY TCP4 203.0.113.9 192.0.2.1 50000\r\n",
        b"PROXY TCP4 localhost 192.0.2.1 50000 5432\r\n",
        b"PROXY TCP4 \xff 192.0.2.1 50000 5432\r\n",
        b"PROXY UDP4 203.0.113.9 192.0.2.1 50000 5432\r\n",
        b"PROXY UNKNOWN " + b"x" * 93,
    ],
    ids=repr,
)
def test_anything_else_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(noise: bytes) -> None:
    for data in (noise, SIGNATURE + noise, b"PROXY " + noise, b"PROXY TCP6 " + noise):
        try:
            header = parse(data)
        except ProtocolViolation:
            continue
        assert header is None or header.size <= len(data)
