"""Clients behind load balancers that speak the PROXY protocol."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator

import psycopg
import pytest

from ogelproxy.auth.scram import ScramClient
from ogelproxy.protocol import messages
from ogelproxy.protocol.forwarding import SIGNATURE
from tests.fixtures.certificates import Authority
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, kinds
from tests.fixtures.postgres import Postgres
from tests.fixtures.secured import JWT_SECRET, REJECTED, SSL_REQUEST, token, trusting

LOCAL, FORWARDED = 0x20, 0x21
#: Only from here a header is taken; the whole of 127/8 is this machine.
BALANCER = "127.0.9.1"


@pytest.fixture(scope="module")
def balanced(
    postgres: Postgres,
    authority: Authority,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Proxy]:
    """A proxy that believes the load balancers of two networks."""
    issued = authority.issue()
    proxy = Proxy(
        postgres,
        tmp_path_factory.mktemp("balanced"),
        {
            "JWT_SECRET": JWT_SECRET,
            "OGELPROXY_TLS_CERT": str(issued.cert),
            "OGELPROXY_TLS_KEY": str(issued.key),
            "OGELPROXY_LISTEN_PROXY_PROTOCOL": "127.0.9.0/24, 2001:db8::/32",
        },
    )
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def member(balanced: Proxy) -> Organization:
    return balanced.create_organization()


def header(source: str, command: int = FORWARDED, extension: bytes = b"") -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    packed = socket.inet_pton(family, source)
    body = packed + packed + struct.pack(">HH", 50_000, 5432) + extension
    kind = 0x21 if ":" in source else 0x11
    return SIGNATURE + struct.pack(">BBH", command, kind, len(body)) + body


UNSPECIFIED = SIGNATURE + struct.pack(">BBH", FORWARDED, 0, 0)


def wrong_key(member: Organization, source: str) -> dict[str, str]:
    """The refusal of a wrong key from `source`, behind the load balancer."""
    with RawClient(member.proxy, source=BALANCER) as client:
        client.send(header(source))
        client.start(member.handle, "app")
        kind, body = client.receive()
        if kind == b"E":
            return messages.read_fields(body)
        scram = ScramClient("", "ogk_" + "x" * 32)
        first = scram.first()
        size = len(first).to_bytes(4, "big")
        client.send(messages.message(b"p", b"SCRAM-SHA-256\0" + size + first))
        _, challenge = client.receive()
        client.send(messages.message(b"p", scram.final(challenge[4:])))
        return client.refusal()


@pytest.mark.parametrize(
    "first",
    [
        header("203.0.113.9"),
        header("2001:db8:1::9", extension=b"\x03\0\4abcd" * 50),
        header("203.0.113.9", LOCAL),
        UNSPECIFIED,
        b"PROXY TCP4 203.0.113.9 192.0.2.1 50000 5432\r\n",
        b"PROXY UNKNOWN\r\n",
    ],
    ids=["v4", "v6 with extensions", "local", "unspecified", "line", "unknown line"],
)
@pytest.mark.parametrize("is_glued", [True, False])
def test_client_behind_a_balancer_logs_in(
    member: Organization, first: bytes, is_glued: bool
) -> None:
    with RawClient(member.proxy, source=BALANCER) as client:
        start = messages.startup({"user": member.handle, "database": "app"})
        for part in [first + start] if is_glued else [first, start]:
            client.send(part)
        client.authenticate(member.key)
        assert client.until(b"Z")[-1][1] == b"I"
        assert kinds(client.query("SELECT 42")) == "TDCZ"


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "asked for"])
def test_tls_begins_behind_the_header(member: Organization, is_direct: bool) -> None:
    context = trusting()
    context.set_alpn_protocols(["postgresql"])
    with RawClient(member.proxy, source=BALANCER) as client:
        client.send(header("203.0.113.9"))
        if not is_direct:
            client.send(SSL_REQUEST)
            assert client.socket.recv(1) == b"S"
        client.socket = context.wrap_socket(client.socket)
        client.start(f"{member.handle}.jwt", "app")
        assert client.receive() == (b"R", b"\0\0\0\3")
        secret = token(member.handle, aud=None).encode()
        client.send(messages.message(b"p", secret + b"\0"))
        assert client.until(b"Z")[-1][1] == b"I"
    assert isinstance(client.socket, ssl.SSLSocket)


def test_clients_elsewhere_send_no_header(member: Organization) -> None:
    with psycopg.connect(member.dsn()) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)
    with RawClient(member.proxy, source="127.0.8.1") as client:
        client.send(header("203.0.113.9"))
        client.start(member.handle, "app")
        # To Postgres, too, it is a packet of an impossible length: closed in silence.
        assert client.to_end() == []


@pytest.mark.parametrize(
    "data",
    [
        messages.startup({"user": "org_abc", "database": "app"}),
        SSL_REQUEST,
        b"\x16\x03\x01\x02\x00",
        SIGNATURE + b"\x11\x11\0\0",
        SIGNATURE + struct.pack(">BBH", FORWARDED, 0x11, 0xFFFF),
        b"PROXY TCP4 somewhere\r\n",
        b"PROXY " + b"x" * 200,
    ],
    ids=repr,
)
def test_balancer_without_a_good_header_is_refused(
    balanced: Proxy, data: bytes
) -> None:
    with RawClient(balanced, source=BALANCER) as client:
        client.send(data)
        refused = client.refusal()
        assert (refused["S"], refused["C"]) == ("FATAL", "08P01")


def test_health_check_that_sends_nothing_more_is_forgotten(
    balanced: Proxy, member: Organization
) -> None:
    for data in (b"", SIGNATURE[:5], header("203.0.113.9", LOCAL)):
        with RawClient(balanced, source=BALANCER) as client:
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.to_end() == []
    with psycopg.connect(member.dsn()):
        pass


@pytest.mark.parametrize("source", ["203.0.113.9", "127.0.0.1", "::1"])
def test_no_address_behind_a_balancer_is_private(
    member: Organization, source: str
) -> None:
    with RawClient(member.proxy, source=BALANCER) as client:
        client.send(header(source))
        client.start(f"{member.handle}.jwt", "app")
        assert "needs TLS" in client.refusal()["M"]


def test_balancer_that_does_not_tell_the_client_is_not_private(
    member: Organization,
) -> None:
    with RawClient(member.proxy, source=BALANCER) as client:
        client.send(UNSPECIFIED)
        client.start(f"{member.handle}.jwt", "app")
        assert "needs TLS" in client.refusal()["M"]


def test_balancer_that_speaks_for_itself_is_as_private_as_it_is(
    member: Organization,
) -> None:
    with RawClient(member.proxy, source=BALANCER) as client:
        client.send(header("203.0.113.9", LOCAL))
        client.start(f"{member.handle}.jwt", "app")
        assert client.receive() == (b"R", b"\0\0\0\3")


def test_failed_logins_count_for_the_client_not_the_balancer(
    member: Organization,
) -> None:
    from_one, from_other = "203.0.113.9", "198.51.100.9"
    for _ in range(10):
        assert wrong_key(member, from_one) == REJECTED
    assert wrong_key(member, from_one)["C"] == "28000"
    assert wrong_key(member, from_other) == REJECTED


def test_log_names_the_client(balanced: Proxy, member: Organization) -> None:
    assert wrong_key(member, "203.0.113.77") == REJECTED
    assert "203.0.113.77" in balanced.log.read_text()
