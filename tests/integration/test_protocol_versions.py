"""Versions and options of the protocol, with clients and with servers (manual 55.2)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from ogelproxy.protocol import messages
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import PATIENCE, RawClient, add_databases, eventually, kinds
from tests.fixtures.postgres import Postgres
from tests.fixtures.servers import Tunnel

PROTOCOL_3 = 3 << 16
GREASE = "_pq_.test_protocol_negotiation"  # sent by libpq from version 19 on
LONG = 32  # bytes of a cancel key as Postgres 18 makes them


def first_packet(version: int, *words: str) -> bytes:
    body = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    return struct.pack(">ii", len(body) + 9, version) + body + b"\0"


def negotiated(port: int, packet: bytes) -> list[tuple[bytes, bytes]]:
    """What a server answers up to the authentication; of an error, its SQLSTATE."""
    collected = []
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(packet)
        with sock.makefile("rb") as file:
            while (kind := file.read(1)) not in (b"R", b""):
                body = file.read(int.from_bytes(file.read(4), "big") - 4)
                if kind == b"E":
                    body = messages.read_fields(body)["C"].encode()
                collected.append((kind, body))
    return collected


# With clients.


@pytest.mark.parametrize(
    ("version", "options"),
    [
        (PROTOCOL_3, []),
        (PROTOCOL_3 + 1, []),
        (PROTOCOL_3 + 2, []),
        (PROTOCOL_3 + 3, []),
        (PROTOCOL_3 + 9999, [GREASE, ""]),
        (PROTOCOL_3 + 0xFFFF, []),
        (PROTOCOL_3, [GREASE, ""]),
        (PROTOCOL_3 + 2, ["_pq_.b", "1", "_pq_.a", "x", "_pq_.b", "2"]),
        (PROTOCOL_3 + 2, ["_pq_.", "x", "_pq_.\udcff", "x"]),
        (PROTOCOL_3, [word for n in range(500) for word in (f"_pq_.{n}", "x")]),
        (2 << 16, []),
        ((4 << 16) + 1, []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_version_is_negotiated_as_by_postgres(
    organization: Organization, version: int, options: list[str]
) -> None:
    user = ["user", organization.handle, "database", "app"]
    packet = first_packet(version, *options[:2], *user, *options[2:])
    proxied = negotiated(organization.proxy.port, packet)
    if version >> 16 == 2:
        # Postgres answers with the same, in the form of protocol 2.
        assert proxied == [(b"E", b"0A000")]
    else:
        assert proxied == negotiated(organization.proxy.postgres.port, packet)


@pytest.mark.parametrize(
    ("minor", "size"), [(0, 4), (1, 4), (2, LONG), (3, LONG), (9999, LONG)]
)
def test_cancel_key_is_as_long_as_the_version_allows(
    organization: Organization, minor: int, size: int
) -> None:
    with RawClient(organization.proxy) as client:
        client.start(organization.handle, "app", minor=minor)
        if minor > 2:
            assert client.receive() == (b"v", struct.pack(">ii", PROTOCOL_3 + 2, 0))
        client.authenticate(organization.key)
        keys = [body for kind, body in client.until(b"Z") if kind == b"K"]
    assert [len(key) for key in keys] == [4 + size]


def wait_until_it_runs(organization: Organization, query: str) -> None:
    with psycopg.connect(organization.direct_dsn, autocommit=True) as beside:
        eventually(
            lambda: bool(
                beside.execute(
                    "SELECT FROM pg_stat_activity WHERE state = 'active' "
                    "AND datname = current_database() AND query = %s",
                    [query],
                ).rowcount
            )
        )


def sleep_until_canceled(
    organization: Organization, connection: psycopg.Connection
) -> None:
    query = f"SELECT pg_sleep(60) AS s{os.urandom(4).hex()}"

    def cancel_once_it_runs() -> None:
        wait_until_it_runs(organization, query)
        connection.cancel_safe(timeout=PATIENCE)

    with ThreadPoolExecutor(1) as threads:
        canceler = threads.submit(cancel_once_it_runs)
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(query)
        canceler.result()


@pytest.mark.parametrize("database", ["session", "transaction", "auto"])
@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_libpq_cancels_in_either_version(
    organization: Organization, database: str, version: str
) -> None:
    with organization.connect(
        database, min_protocol_version=version, max_protocol_version=version
    ) as connection:
        spoken = connection.pgconn.full_protocol_version
        assert f"{spoken // 10_000}.{spoken % 10_000}" == version
        sleep_until_canceled(organization, connection)
        assert connection.execute("SELECT 42").fetchone() == (42,)


def test_libpq_speaks_the_latest_version_when_asked_to(
    organization: Organization,
) -> None:
    with organization.connect(max_protocol_version="latest") as connection:
        assert connection.pgconn.full_protocol_version == 30002


@pytest.mark.parametrize("change", ["shorter", "longer", "other"])
def test_key_that_is_nearly_right_cancels_nothing(
    organization: Organization, change: str
) -> None:
    with RawClient(organization.proxy) as client:
        client.start(organization.handle, "session", minor=2)
        client.authenticate(organization.key)
        (key,) = (body for kind, body in client.until(b"Z") if kind == b"K")
        secret = {
            "shorter": key[4:8],
            "longer": key[4:] + b"x",
            "other": key[4:-1] + bytes([key[-1] ^ 1]),
        }[change]
        query = f"SELECT pg_sleep(60) AS s{os.urandom(4).hex()}"
        client.send(messages.query(query))
        wait_until_it_runs(organization, query)
        cancel(organization.proxy, int.from_bytes(key[:4], "big"), secret)
        wait_until_it_runs(organization, query)
        cancel(organization.proxy, int.from_bytes(key[:4], "big"), key[4:])
        assert kinds(client.until(b"Z")) == "TEZ"


def cancel(proxy: Proxy, process_id: int, secret: bytes) -> None:
    with RawClient(proxy) as canceler:
        canceler.send(messages.cancel_request(process_id, secret))
        assert canceler.to_end() == []


# With servers.


def old(packet: bytes) -> bytes | None:
    """The answer of a Postgres of before 2018 to a first packet, if it refuses."""
    version = struct.unpack_from(">I", packet, 4)[0]
    if version >> 16 != 3 or version == PROTOCOL_3:
        return None
    fields = b"SFATAL\0C0A000\0Munsupported frontend protocol 3.2\0\0"
    return messages.message(b"E", fields)


def silent(packet: bytes) -> bytes | None:
    return None if old(packet) is None else b""


def versions(tunnel: Tunnel) -> list[int]:
    """The versions that connections through `tunnel` asked for."""
    return [struct.unpack_from(">I", sent, 4)[0] for sent in tunnel.sent]


def test_server_is_asked_for_long_keys_and_canceled_by_one(
    proxy: Proxy, postgres: Postgres
) -> None:
    member = proxy.create_organization()
    with Tunnel((postgres.host, postgres.port)) as tunnel:
        (name,) = asyncio.run(add_databases(member, [through(member, tunnel)]))
        with member.connect(name) as connection:
            sleep_until_canceled(member, connection)
        assert versions(tunnel) == [PROTOCOL_3 + 2, messages.CANCEL_REQUEST]
        at = tunnel.received[0].index(b"K" + struct.pack(">i", 8 + LONG))
        key = tunnel.received[0][at + 5 : at + 9 + LONG]
        assert tunnel.sent[1][8:] == key


def through(member: Organization, tunnel: Tunnel) -> str:
    """The organisation's database by way of a tunnel."""
    port = str(member.proxy.postgres.port)
    return member.direct_dsn.replace(port, str(tunnel.port)) + "?sslmode=disable"


@pytest.mark.parametrize("judge", [old, silent])
def test_server_that_knows_only_3_0_is_asked_for_that_from_then_on(
    proxy: Proxy, postgres: Postgres, judge: object
) -> None:
    member = proxy.create_organization()
    address = (postgres.host, postgres.port)
    with Tunnel(address, judge=judge) as tunnel:  # type: ignore[arg-type]
        (name,) = asyncio.run(add_databases(member, [through(member, tunnel)]))
        with member.connect(name) as first, member.connect(name) as second:
            with first.transaction(), second.transaction():
                assert first.execute("SELECT 42").fetchone() == (42,)
                assert second.execute("SELECT 42").fetchone() == (42,)
        assert versions(tunnel) == [PROTOCOL_3 + 2, PROTOCOL_3, PROTOCOL_3]


def test_postgres_17_negotiates_down(proxy: Proxy, tls_postgres: Postgres) -> None:
    member = proxy.create_organization()
    role = tls_postgres.create_role()
    with Tunnel((tls_postgres.host, tls_postgres.port)) as tunnel:
        dsn = tls_postgres.dsn("postgres", role).replace(
            f":{tls_postgres.port}/", f":{tunnel.port}/"
        )
        (name,) = asyncio.run(add_databases(member, [f"{dsn}?sslmode=disable"]))
        with member.connect(name) as connection:
            row = connection.execute("SHOW server_version").fetchone()
            assert row is not None
            assert row[0].startswith("17")
        assert versions(tunnel) == [PROTOCOL_3 + 2]
        assert tunnel.received[0].startswith(b"v")
        assert b"K" + struct.pack(">i", 12) in tunnel.received[0]
