"""TLS towards clients: its modes, its certificate and what it binds a login to."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import time
from pathlib import Path

import psutil
import psycopg
import pytest
from cryptography import x509

from ogelproxy.auth.scram import ScramClient
from ogelproxy.protocol import messages
from tests.fixtures.certificates import Authority, Issued
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import PATIENCE, RawClient, eventually
from tests.fixtures.secured import SSL_REQUEST, connects, trusting


@pytest.mark.parametrize(
    "options",
    [
        {"sslmode": "require"},
        {"sslmode": "verify-full"},
        {"sslmode": "verify-full", "host": "localhost"},
        {"sslmode": "require", "channel_binding": "require"},
        {"sslmode": "require", "channel_binding": "disable"},
        {"sslmode": "require", "ssl_min_protocol_version": "TLSv1.3"},
        {"sslmode": "require", "ssl_max_protocol_version": "TLSv1.2"},
        {"sslmode": "disable"},
    ],
    ids=lambda options: " ".join(f"{name}={options[name]}" for name in options),
)
def test_tls_works_in_every_mode(
    secured_member: Organization, authority: Authority, options: dict[str, str]
) -> None:
    if options["sslmode"] == "verify-full":
        options = options | {"sslrootcert": str(authority.cert)}
    with psycopg.connect(secured_member.dsn("transaction"), **options) as connection:  # type: ignore[arg-type]
        assert connection.execute("SELECT 42").fetchone() == (42,)
        big = connection.execute("SELECT repeat('x', 3000000)").fetchone()
        assert big == ("x" * 3_000_000,)
        assert connection.pgconn.ssl_in_use == (options["sslmode"] != "disable")


def test_channel_binding_is_offered_over_tls_only(secured_member: Organization) -> None:
    offers = []
    for has_tls in (False, True):
        with RawClient(secured_member.proxy) as client:
            if has_tls:
                client.send(SSL_REQUEST)
                assert client.socket.recv(1) == b"S"
                client.socket = trusting().wrap_socket(client.socket)
            client.start(secured_member.handle, "app")
            offers.append(client.receive()[1][4:].split(b"\0")[:-2])
    assert offers == [[b"SCRAM-SHA-256"], [b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"]]


def test_channel_binding_to_another_certificate_is_rejected(
    secured_member: Organization,
) -> None:
    plus = "SCRAM-SHA-256-PLUS"
    with RawClient(secured_member.proxy) as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        client.socket = trusting().wrap_socket(client.socket)
        client.start(secured_member.handle, "app")
        client.receive()
        scram = ScramClient(
            "", secured_member.key, offered=[plus], channel_binding=b"m" * 32
        )
        first = scram.first()
        size = len(first).to_bytes(4, "big")
        client.send(messages.message(b"p", plus.encode() + b"\0" + size + first))
        _, challenge = client.receive()
        client.send(messages.message(b"p", scram.final(challenge[4:])))
        refused = client.refusal()
    assert refused["S"] == "FATAL"
    assert refused["C"] in ("28P01", "08P01")


def test_bytes_in_clear_behind_an_encryption_request_are_refused(
    secured_member: Organization, proxy: Proxy
) -> None:
    startup = messages.startup({"user": secured_member.handle, "database": "app"})
    for target in (secured_member.proxy, proxy):
        with RawClient(target) as client:
            client.send(SSL_REQUEST + startup)
            refused = client.refusal()
        assert (refused["S"], refused["C"]) == ("FATAL", "08P01")


def test_proxy_without_a_certificate_says_that_it_has_none(
    organization: Organization,
) -> None:
    assert connects(organization.dsn() + "?sslmode=prefer")
    assert not connects(organization.dsn() + "?sslmode=require")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_session_is_taken_up_again(
    secured_member: Organization, version: ssl.TLSVersion
) -> None:
    context = trusting()
    context.minimum_version = context.maximum_version = version
    session: ssl.SSLSession | None = None
    for is_later in (False, True):
        with RawClient(secured_member.proxy) as client:
            client.send(SSL_REQUEST)
            assert client.socket.recv(1) == b"S"
            wrapped = context.wrap_socket(client.socket, session=session)
            client.socket = wrapped
            client.start(secured_member.handle, "app")
            assert client.receive()[0] == b"R"
            assert wrapped.session_reused == is_later
            # In TLS 1.3 it comes after the handshake (RFC 8446, 4.6.1).
            session = wrapped.session
            assert session is not None and session.has_ticket


def test_client_that_pauses_inside_tls_costs_nothing(
    secured_member: Organization,
) -> None:
    process = secured_member.proxy.process
    assert process is not None
    with RawClient(secured_member.proxy) as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        client.socket = trusting().wrap_socket(client.socket)
        before = psutil.Process(process.pid).cpu_times()
        time.sleep(0.5)
        after = psutil.Process(process.pid).cpu_times()
        client.start(secured_member.handle, "app")
        assert client.receive()[0] == b"R"
    spent = after.user + after.system - before.user - before.system
    assert spent < 0.2


def install(issued: Issued, directory: Path) -> None:
    shutil.copy(issued.cert, directory / "server.pem")
    shutil.copy(issued.key, directory / "server.key")


def served_serial(proxy: Proxy) -> int:
    """The serial number of the certificate that the proxy shows."""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as sock:
        sock.sendall(SSL_REQUEST)
        assert sock.recv(1) == b"S"
        with trusting().wrap_socket(sock) as wrapped:
            encoded = wrapped.getpeercert(binary_form=True)
    assert encoded is not None
    return x509.load_der_x509_certificate(encoded).serial_number


def serial(issued: Issued) -> int:
    return x509.load_pem_x509_certificate(issued.cert.read_bytes()).serial_number


def test_hangup_signal_brings_a_new_certificate_and_keeps_connections(
    own_proxy: Proxy, authority: Authority, tmp_path: Path
) -> None:
    old, new = authority.issue(), authority.issue()
    install(old, tmp_path)
    own_proxy.settings |= {
        "OGELPROXY_TLS_CERT": str(tmp_path / "server.pem"),
        "OGELPROXY_TLS_KEY": str(tmp_path / "server.key"),
    }
    own_proxy.start()
    member = own_proxy.create_organization()
    assert own_proxy.process is not None
    with member.connect(sslmode="require") as connection:
        assert served_serial(own_proxy) == serial(old)
        install(new, tmp_path)
        own_proxy.process.send_signal(signal.SIGHUP)
        eventually(lambda: served_serial(own_proxy) == serial(new))
        assert connection.execute("SELECT 42").fetchone() == (42,)
        with member.connect(sslmode="require", channel_binding="require"):
            pass
        # A broken one is not taken: the proxy goes on with what it has.
        (tmp_path / "server.pem").write_text("no certificate")
        own_proxy.process.send_signal(signal.SIGHUP)
        eventually(lambda: "not reloaded" in own_proxy.log.read_text())
        assert served_serial(own_proxy) == serial(new)


# Direct TLS (manual 55.2.11).


def handshake(
    proxy: Proxy, protocols: list[str] | None, *, is_direct: bool, **limits: object
) -> ssl.SSLSocket:
    """Begin TLS, offering these protocols (RFC 7301). Raises ssl.SSLError."""
    context = trusting()
    for name, value in limits.items():
        setattr(context, name, value)
    if protocols is not None:
        context.set_alpn_protocols(protocols)
    sock = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE)
    try:
        if not is_direct:
            sock.sendall(SSL_REQUEST)
            assert sock.recv(1) == b"S"
        return context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_direct_tls_works(secured_member: Organization, version: str) -> None:
    with secured_member.connect(
        sslmode="require",
        sslnegotiation="direct",
        channel_binding="require",
        ssl_min_protocol_version=version,
        ssl_max_protocol_version=version,
    ) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)
        assert connection.pgconn.ssl_in_use


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "asked for"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_protocol_is_agreed_on(
    secured: Proxy, is_direct: bool, version: ssl.TLSVersion
) -> None:
    offered = ["h2", "postgresql"]
    with handshake(
        secured, offered, is_direct=is_direct, maximum_version=version
    ) as client:
        assert client.selected_alpn_protocol() == "postgresql"


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "asked for"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_other_protocols_are_refused_with_an_alert(
    secured: Proxy, is_direct: bool, version: ssl.TLSVersion
) -> None:
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        handshake(
            secured, ["http/1.1", "h2"], is_direct=is_direct, maximum_version=version
        )


def test_protocol_has_to_be_named_in_direct_tls_only(secured: Proxy) -> None:
    with handshake(secured, None, is_direct=False) as client:
        assert client.selected_alpn_protocol() is None
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        handshake(secured, None, is_direct=True)


def test_encryption_is_not_asked_for_inside_of_direct_tls(secured: Proxy) -> None:
    with (
        handshake(secured, ["postgresql"], is_direct=True) as wrapped,
        RawClient(secured) as client,
    ):
        client.socket.close()
        client.socket = wrapped
        client.send(SSL_REQUEST)
        assert client.refusal()["C"] == "08P01"


def test_direct_tls_to_a_proxy_without_it_is_closed_without_a_word(
    organization: Organization,
) -> None:
    with pytest.raises(ssl.SSLEOFError):
        handshake(organization.proxy, ["postgresql"], is_direct=True)
    with pytest.raises(psycopg.OperationalError, match=r"SSL|closed"):
        organization.connect(sslmode="require", sslnegotiation="direct")


def client_hello(protocols: list[str] | None = None) -> bytes:
    """The first bytes of a TLS connection."""
    context = trusting()
    if protocols is not None:
        context.set_alpn_protocols(protocols)
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


@pytest.mark.parametrize("size", [1, 2, 5, 6, 9, 10, 43, 100])
def test_hello_that_ends_early_or_comes_in_parts_is_waited_for(
    secured: Proxy, size: int
) -> None:
    whole = client_hello(["postgresql"])
    with RawClient(secured) as client:
        client.send(whole[:size])
        client.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        client.socket.settimeout(PATIENCE)
        client.send(whole[size:])
        assert client.socket.recv(1) == b"\x16"


def test_garbage_behind_a_hellos_first_bytes_is_answered_with_an_alert(
    secured: Proxy,
) -> None:
    for garbage in (b"\x16GET / HTTP", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\0\0"):
        with RawClient(secured) as client:
            client.send(garbage + bytes(100))
            client.socket.shutdown(socket.SHUT_WR)
            with client.socket.makefile("rb") as answer:
                assert answer.read()[:1] == b"\x15"
