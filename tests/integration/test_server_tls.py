"""TLS towards servers, and logins that are bound to it (SCRAM-SHA-256-PLUS)."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg import sql

from ogelproxy.protocol import messages
from tests.fixtures.certificates import Authority
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import FakeServer, add_databases, eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.secured import SSL_REQUEST, trusting
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


@pytest.mark.parametrize("word", ["channel_binding", "sslmode"])
def test_unknown_words_are_refused(member: Organization, word: str) -> None:
    with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
        ask(member, member.direct_dsn, **{word: "perhaps"})


@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
def test_server_of_another_authority_is_refused(
    member: Organization,
    tls_postgres: Postgres,
    role: str,
    tmp_path: Path,
    sslmode: str,
) -> None:
    dsn = tls_postgres.dsn("postgres", role)
    stranger = Authority(tmp_path, "stranger")
    for authorities in (str(stranger.cert), "/nowhere"):
        with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
            ask(member, dsn, sslmode=sslmode, sslrootcert=authorities)
    if sslmode != "require":
        with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
            ask(member, dsn, sslmode=sslmode, sslrootcert="system")


def test_server_of_another_name_is_refused(
    member: Organization, tls_postgres: Postgres, authority: Authority, role: str
) -> None:
    dsn = tls_postgres.dsn("postgres", role).replace("127.0.0.1", "127.0.0.2")
    trusted = {"sslrootcert": str(authority.cert)}
    with Tunnel((tls_postgres.host, tls_postgres.port), host="127.0.0.2") as tunnel:
        dsn = dsn.replace(f":{tls_postgres.port}/", f":{tunnel.port}/")
        assert ask(member, dsn, sslmode="verify-ca", **trusted)
        with pytest.raises(psycopg.OperationalError, match=UNREACHABLE):
            ask(member, dsn, sslmode="verify-full", **trusted)


def test_cancel_request_is_as_secret_as_the_login(
    member: Organization, tls_postgres: Postgres, role: str
) -> None:
    with Tunnel((tls_postgres.host, tls_postgres.port)) as tunnel:
        dsn = by_way_of(tunnel, tls_postgres, role)
        (name,) = asyncio.run(add_databases(member, [f"{dsn}?sslmode=require"]))
        with member.connect(name) as connection:

            def cancel_once_it_runs() -> None:
                with psycopg.connect(tls_postgres.dsn(), autocommit=True) as beside:
                    eventually(
                        lambda: bool(
                            beside.execute(
                                "SELECT FROM pg_stat_activity WHERE usename = %s "
                                "AND query = 'SELECT pg_sleep(60)'",
                                [role],
                            ).rowcount
                        )
                    )
                connection.cancel_safe()

            with ThreadPoolExecutor(1) as threads:
                canceler = threads.submit(cancel_once_it_runs)
                with pytest.raises(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT pg_sleep(60)")
                canceler.result()
        login, cancel = tunnel.sent
        for sent in (login, cancel):
            assert sent.startswith(SSL_REQUEST + b"\x16")
        assert messages.CANCEL_REQUEST.to_bytes(4, "big") not in cancel


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
