"""TLS towards servers, and logins that are bound to it (SCRAM-SHA-256-PLUS)."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg import sql

from ogelproxy.protocol import messages
from tests.fixtures.certificates import Authority
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import FakeServer, add_databases
from tests.fixtures.postgres import Postgres
from tests.fixtures.secured import trusting
from tests.fixtures.servers import CERTIFIED, Tunnel

UNREACHABLE = "the database can't be reached"


@pytest.fixture
def member(proxy: Proxy) -> Organization:
    return proxy.create_organization()


@pytest.fixture(scope="module")
def role(tls_postgres: Postgres) -> str:
    return tls_postgres.create_role()


@pytest.fixture
def thief(tls_postgres: Postgres, authority: Authority) -> Iterator[Tunnel]:
    """A man in the middle, with a certificate of an authority that is trusted."""
    issued = authority.issue()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(issued.cert, issued.key)
    with Tunnel(
        (tls_postgres.host, tls_postgres.port), meet=(ours, trusting())
    ) as tunnel:
        yield tunnel


def ask(member: Organization, dsn: str, **options: str) -> bool:
    """Have a query run by way of `dsn`; return whether the server has TLS there.

    Raises psycopg.OperationalError.
    """
    url = f"{dsn}?{urlencode(options)}"
    (name,) = asyncio.run(add_databases(member, [url]))
    with member.connect(name) as connection:
        row = connection.execute(
            "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        ).fetchone()
    assert row is not None
    return bool(row[0])


@pytest.mark.parametrize("binding", ["disable", "prefer", "require", None])
@pytest.mark.parametrize("sslmode", ["prefer", "require", "verify-ca", "verify-full"])
def test_server_is_reached_over_tls(
    member: Organization,
    tls_postgres: Postgres,
    authority: Authority,
    role: str,
    sslmode: str,
    binding: str | None,
) -> None:
    options = {"sslmode": sslmode}
    if sslmode.startswith("verify"):
        options["sslrootcert"] = str(authority.cert)
    if binding is not None:
        options["channel_binding"] = binding
    assert ask(member, tls_postgres.dsn("postgres", role), **options)


def test_login_is_bound_to_the_channel(
    member: Organization, tls_postgres: Postgres, thief: Tunnel, role: str
) -> None:
    # Only who ends TLS can read which mechanism is chosen; the login then fails.
    dsn = by_way_of(thief, tls_postgres, role)
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, dsn, sslmode="require", channel_binding="prefer")
    assert b"SCRAM-SHA-256-PLUS\0" in thief.sent[0]


def by_way_of(thief: Tunnel, tls_postgres: Postgres, role: str) -> str:
    dsn = tls_postgres.dsn("postgres", role)
    return dsn.replace(f":{tls_postgres.port}/", f":{thief.port}/")


def test_man_in_the_middle_is_refused_where_binding_is_required(
    member: Organization,
    tls_postgres: Postgres,
    thief: Tunnel,
    authority: Authority,
    role: str,
) -> None:
    dsn = by_way_of(thief, tls_postgres, role)
    trusted = {"sslmode": "verify-full", "sslrootcert": str(authority.cert)}
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, dsn, **trusted, channel_binding="require")
    assert thief.sent
    # It is a good one: nothing else gives it away.
    assert ask(member, dsn, **trusted, channel_binding="disable")


def test_server_without_tls_is_refused_where_binding_is_required(
    member: Organization,
) -> None:
    dsn = member.direct_dsn
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, dsn, channel_binding="require")
    assert not ask(member, dsn, channel_binding="prefer")


OK, CLEAR, MD5, SASL = (
    messages.authentication(code.to_bytes(4, "big") + data)
    for code, data in ((0, b""), (3, b""), (5, b"salt"), (10, b"SCRAM-SHA-256\0\0"))
)
READY = messages.backend_key_data(7, b"four") + messages.READY_IDLE


@pytest.mark.parametrize(
    ("binding", "answers", "is_reached"),
    [
        ("prefer", [OK + READY], True),
        ("prefer", [MD5, OK + READY], True),
        ("prefer", [SASL, OK + READY], False),
        ("require", [OK + READY], False),
        ("require", [CLEAR, OK + READY], False),
        ("require", [MD5, OK + READY], False),
        ("require", [SASL, OK + READY], False),
    ],
)
def test_server_that_proves_nothing_is_no_server(
    member: Organization, binding: str, answers: list[bytes], is_reached: bool
) -> None:
    said: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        for answer in answers:
            said.append(sock.recv(65536))
            sock.sendall(answer)
        sock.recv(65536)

    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        FakeServer(talk, listening),
    ):
        port = listening.getsockname()[1]
        dsn = f"postgresql://user:secret-word@127.0.0.1:{port}/app"
        url = f"{dsn}?sslmode=disable&channel_binding={binding}"
        (name,) = asyncio.run(add_databases(member, [url]))
        if is_reached:
            member.connect(name).close()
        else:
            with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
                member.connect(name)
    assert not any(b"secret-word" in part for part in said)


def test_unknown_word_for_binding_is_refused(member: Organization) -> None:
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, member.direct_dsn, channel_binding="perhaps")


def test_server_that_wants_a_certificate_is_shown_one(
    member: Organization, tls_postgres: Postgres, authority: Authority
) -> None:
    role = tls_postgres.create_role()
    tls_postgres.execute(
        sql.SQL("CREATE ROLE {0}; GRANT {0} TO {1}").format(
            sql.Identifier(CERTIFIED), sql.Identifier(role)
        )
    )
    dsn = tls_postgres.dsn("postgres", role)
    issued = authority.issue("proxy", is_client=True)
    shown = {"sslcert": str(issued.cert), "sslkey": str(issued.key)}
    assert ask(member, dsn, sslmode="require", **shown)
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, dsn, sslmode="require")
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, dsn, sslmode="require", **shown | {"sslkey": "/nowhere"})
