"""The PROXY protocol: whom a load balancer speaks for.

Versions 1 and 2 of haproxy's doc/proxy-protocol.txt. Only balancers that the
settings name are believed; they must send a header, nobody else may.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ogelproxy.errors import ProtocolViolation

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LINE_START = b"PROXY "

#: Section 2.1: no line is longer.
MAX_LINE_BYTES = 107
#: Room for the addresses (216 bytes for Unix sockets) and balancers' extensions.
MAX_HEADER_BYTES = 4_096

#: Version 2's second byte: its version, and the command.
LOCAL, FORWARDED = 0x20, 0x21
#: Its third byte: address family and transport, with the size of an address.
#: Unspecified, TCP over IPv4 and IPv6, Unix stream sockets.
ADDRESS_BYTES = {0x00: 0, 0x11: 4, 0x21: 16, 0x31: 0}


@dataclass(frozen=True, slots=True)
class Header:
    """A header of `size` bytes.

    `is_forwarded` is False when the balancer speaks for itself, as for its health
    checks. `source` is the client's IP address; empty where the balancer doesn't
    tell one.
    """

    size: int
    is_forwarded: bool
    source: str = ""


def parse(data: bytes) -> Header | None:
    """Read the header that `data` begins with, or None when more must come.

    Raises ProtocolViolation for anything else, at the first byte that is wrong.
    """
    if SIGNATURE.startswith(data[: len(SIGNATURE)]):
        return _parse_binary(data)
    if LINE_START.startswith(data[: len(LINE_START)]):
        return _parse_line(data)
    raise ProtocolViolation("expected a PROXY protocol header")


def _parse_binary(data: bytes) -> Header | None:
    if len(data) < 16:
        return None
    command, family = data[12], data[13]
    size = 16 + int.from_bytes(data[14:16], "big")
    if command not in (LOCAL, FORWARDED) or size > MAX_HEADER_BYTES:
        raise ProtocolViolation("PROXY protocol header is malformed")
    if len(data) < size:
        return None
    if command == LOCAL:
        # Section 2.2: the addresses then mean nothing.
        return Header(size, is_forwarded=False)
    length = ADDRESS_BYTES.get(family)
    # Both addresses and both ports.
    if length is None or (length and size < 16 + 2 * length + 4):
        raise ProtocolViolation("PROXY protocol address is malformed")
    return Header(size, True, _text(data[16 : 16 + length]) if length else "")


def _parse_line(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, MAX_LINE_BYTES)
    if end < 0:
        if len(data) >= MAX_LINE_BYTES:
            raise ProtocolViolation("PROXY protocol line is too long")
        return None
    match data[:end].split(b" "):
        case [_, b"UNKNOWN", *_]:
            return Header(end + 2, is_forwarded=True)
        case [_, b"TCP4" | b"TCP6", source, _, _, _]:
            try:
                packed = ipaddress.ip_address(source.decode("ascii")).packed
            except ValueError:
                raise ProtocolViolation("PROXY protocol address is bad") from None
            return Header(end + 2, True, _text(packed))
    raise ProtocolViolation("PROXY protocol line is malformed")


def _text(packed: bytes) -> str:
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)
