"""What is read from a ClientHello."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol.hello import MAX_HELLO_BYTES, protocols


def client_hello(*names: str, **limits: object) -> bytes:
    """The ClientHello that OpenSSL sends, one record."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, value in limits.items():
        setattr(context, name, value)
    if names:
        context.set_alpn_protocols(list(names))
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def fragmented(hello: bytes, size: int) -> bytes:
    """The same message in records of `size` bytes."""
    body = hello[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(hello[:3] + len(p).to_bytes(2, "big") + p for p in parts)


@pytest.mark.parametrize(
    "names", [(), ("postgresql",), ("h2", "postgresql", "x" * 255)]
)
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_names_are_read_in_their_order(
    names: tuple[str, ...], newest: ssl.TLSVersion
) -> None:
    hello = client_hello(*names, maximum_version=newest)
    expected = tuple(name.encode() for name in names)
    assert protocols(hello) == expected
    assert protocols(hello + b"more") == expected
    for size in (1, 2, 3, 4, 7, 100):
        assert protocols(fragmented(hello, size)) == expected


def test_every_beginning_asks_for_more() -> None:
    hello = client_hello("postgresql")
    for whole in (hello, fragmented(hello, 3)):
        assert all(protocols(whole[:size]) is None for size in range(len(whole)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x15",
        b"\x16\x03\x01\0\0",
        b"\x16\x03\x01" + (MAX_HELLO_BYTES + 1).to_bytes(2, "big"),
        b"\x16\x03\x01\0\4\2\0\0\0",  # a ServerHello
        b"\x16\x03\x01\0\4\1\xff\xff\xff",
        b"\x16\x03\x01\0\4\1\0\0\0",
        b"\x16\x03\x01\0\1\1\x17",
    ],
)
def test_what_can_not_be_a_hello_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        protocols(data)


HELLO = client_hello("postgresql")


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    hello = bytearray(HELLO)
    hello[at : at + len(noise)] = noise
    for data in (bytes(hello), b"\x16" + noise):
        try:
            found = protocols(data)
        except ProtocolViolation:
            continue
        assert found is None or all(isinstance(name, bytes) for name in found)
