"""Authenticator: whole exchanges, by our own client and by libpq."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import jwt
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.auth import Authenticator, Exchange, apikey
from ogelproxy.auth.scram import SCRAM_SHA_256, ScramClient, make_verifier
from ogelproxy.config import Auth, Secret
from ogelproxy.errors import (
    CredentialRejected,
    LoginThrottled,
    OgelError,
    ProtocolViolation,
    TokenRequiresTLS,
)
from ogelproxy.tenants.model import KeyVerifier, Tenant, Tier
from tests.fixtures.certificates import Authority, Issued
from tests.fixtures.postgres import Postgres

NOW = 1_800_000_000.0
TOKEN_SECRET = "a shared secret of more than 32 bytes"
SALT = bytes(range(16))
ITERATIONS = 4096
SOURCE = "192.0.2.1"
TIER = Tier("free", 5, 10.0, 1.0, False, 0.0, 5.0, 10.0, None, None, 1)


def tenant(*secrets: str, handle: str = "org_a") -> Tenant:
    keys = tuple(
        KeyVerifier(uuid4(), "key", *make_verifier(secret, SALT, ITERATIONS))
        for secret in secrets
    )
    return Tenant(
        id=uuid4(),
        handle=handle,
        name="A",
        tier=TIER,
        is_suspended=False,
        version=1,
        salt=SALT,
        iterations=ITERATIONS,
        keys=keys,
    )


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def authenticator(clock: Clock | None = None, **settings: Any) -> Authenticator:
    config = Auth(**{"jwt_secret": Secret(TOKEN_SECRET)} | settings)
    return Authenticator(
        config,
        mock_secret=b"mock",
        clock=clock or Clock(),
        wall_clock=lambda: NOW,
    )


def begin(who: Authenticator, tenant: Tenant | None, **changes: Any) -> Exchange:
    asked: dict[str, Any] = {
        "is_token": False,
        "is_private": False,
        "source": SOURCE,
        "channel_binding": None,
    }
    return who.begin(tenant, "org_a", **asked | changes)


def initial(data: bytes, mechanism: str = SCRAM_SHA_256) -> bytes:
    return mechanism.encode() + b"\0" + len(data).to_bytes(4, "big") + data


async def log_in(exchange: Exchange, secret: str) -> None:
    """Be the client that libpq is, up to AuthenticationOk."""
    client = ScramClient("org_a", secret)
    exchange.start()
    (challenge,) = await exchange.step(initial(client.first()))
    assert challenge[:4] == (11).to_bytes(4, "big")
    (last,) = await exchange.step(client.final(challenge[4:]))
    assert last[:4] == (12).to_bytes(4, "big")
    client.verify(last[4:])


def token(**claims: Any) -> bytes:
    content = {"org_id": "org_a", "exp": NOW + 60} | claims
    return jwt.encode(content, TOKEN_SECRET, algorithm="HS256").encode() + b"\0"


@pytest.mark.parametrize(
    ("user", "handle", "is_token"),
    [
        ("org_abc123", "org_abc123", False),
        ("org_abc123.jwt", "org_abc123", True),
        ("org_" + "x" * 56, "org_" + "x" * 56, False),
    ],
)
def test_a_user_is_a_handle_and_maybe_a_suffix(
    user: str, handle: str, is_token: bool
) -> None:
    assert Authenticator.split_user(user) == (handle, is_token)


@pytest.mark.parametrize(
    "user",
    [
        "",
        "org_",
        "postgres",
        "org_A",
        "org_a\n",
        "org_a.jwt.jwt",
        "org_a.JWT",
        "org_é",
        "org_" + "x" * 57,
    ],
)
def test_a_user_that_no_organisation_can_have_is_rejected(user: str) -> None:
    with pytest.raises(CredentialRejected):
        Authenticator.split_user(user)


async def test_a_key_logs_in_and_is_named_in_the_credential() -> None:
    someone = tenant("first", "second")
    exchange = begin(authenticator(), someone)
    assert exchange.start() == b"\0\0\0\x0aSCRAM-SHA-256\0\0"
    assert exchange.credential is None
    await log_in(exchange, "second")
    assert exchange.credential is not None
    assert exchange.credential.handle == "org_a"
    assert exchange.credential.key_id == someone.keys[1].id


async def test_channel_binding_is_offered_first_over_tls() -> None:
    exchange = begin(authenticator(), tenant("key"), channel_binding=b"x" * 32)
    expected = b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"
    assert exchange.start() == expected


async def test_an_unknown_organisation_fails_just_as_a_wrong_key_does() -> None:
    who = authenticator()
    heard = []
    for someone in (tenant("right"), None, replace(tenant("right"), keys=())):
        exchange = begin(who, someone)
        client = ScramClient("org_a", "wrong")
        start = exchange.start()
        (challenge,) = await exchange.step(initial(client.first()))
        salt, iterations = client.challenge(challenge[4:])
        with pytest.raises(CredentialRejected) as caught:
            await exchange.step(client.final(challenge[4:]))
        error = caught.value
        assert exchange.credential is None
        heard.append(
            (
                start,
                len(challenge),
                len(salt),
                iterations,
                error.sqlstate,
                error.client_text,
                error.detail,
                error.hint,
            )
        )
    assert len(set(heard)) == 1


async def test_an_unknown_organisation_has_the_same_salt_every_time() -> None:
    salts = set()
    for _ in range(2):
        exchange = begin(authenticator(), None)
        client = ScramClient("org_a", "any")
        (challenge,) = await exchange.step(initial(client.first()))
        salts.add(client.challenge(challenge[4:]))
    assert len(salts) == 1


async def test_an_initial_message_without_a_response_is_asked_for_one() -> None:
    someone = tenant("key")
    exchange = begin(authenticator(), someone)
    client = ScramClient("org_a", "key")
    assert await exchange.step(b"SCRAM-SHA-256\0\xff\xff\xff\xff") == [b"\0\0\0\x0b"]
    (challenge,) = await exchange.step(client.first())
    await exchange.step(client.final(challenge[4:]))
    assert exchange.credential is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"SCRAM-SHA-256",
        b"SCRAM-SHA-256\0",
        b"SCRAM-SHA-256\0\0\0",
        b"SCRAM-SHA-256\0\0\0\0\x09n,,n=,r=a\0",
        b"SCRAM-SHA-256\0\x7f\xff\xff\xffn,,n=,r=a",
        b"SCRAM-SHA-256\0\xff\xff\xff\xffn,,n=,r=a",
        b"SCRAM-SHA-256-PLUS\0\0\0\0\x09n,,n=,r=a",
        b"PLAIN\0\0\0\0\x09n,,n=,r=a",
        b"\xff\xfe\0\0\0\0\x09n,,n=,r=a",
    ],
)
async def test_a_malformed_initial_message_is_a_violation(body: bytes) -> None:
    exchange = begin(authenticator(), tenant("key"))
    with pytest.raises(ProtocolViolation):
        await exchange.step(body)


async def test_a_nonce_serves_one_guess() -> None:
    exchange = begin(authenticator(), tenant("right"))
    wrong, right = ScramClient("org_a", "wrong"), ScramClient("org_a", "right")
    (challenge,) = await exchange.step(initial(wrong.first()))
    with pytest.raises(CredentialRejected):
        await exchange.step(wrong.final(challenge[4:]))
    for body in (wrong.final(challenge[4:]), initial(right.first())):
        with pytest.raises(ProtocolViolation, match="over"):
            await exchange.step(body)


async def test_a_token_logs_in_where_nobody_listens() -> None:
    exchange = begin(authenticator(), tenant(), is_token=True, is_private=True)
    assert exchange.start() == b"\0\0\0\x03"
    assert await exchange.step(token()) == []
    assert exchange.credential is not None
    assert exchange.credential.expires_at == NOW + 60


async def test_a_token_is_not_asked_for_in_clear() -> None:
    with pytest.raises(TokenRequiresTLS):
        begin(authenticator(), tenant(), is_token=True)


async def test_a_good_token_of_an_unknown_organisation_is_rejected() -> None:
    exchange = begin(authenticator(), None, is_token=True, is_private=True)
    with pytest.raises(CredentialRejected) as caught:
        await exchange.step(token())
    assert caught.value.client_text == CredentialRejected.client_text
    with pytest.raises(ProtocolViolation, match="over"):
        await exchange.step(token())


@pytest.mark.parametrize("body", [b"", b"abc", b"a\0b\0", token()[:-1], token() + b"x"])
async def test_a_malformed_password_message_is_a_violation(body: bytes) -> None:
    exchange = begin(authenticator(), tenant(), is_token=True, is_private=True)
    with pytest.raises(ProtocolViolation):
        await exchange.step(body)


@given(bodies=st.lists(st.binary(max_size=100), max_size=4), is_token=st.booleans())
def test_arbitrary_messages_are_refused_cleanly(
    bodies: list[bytes], is_token: bool
) -> None:
    async def run() -> None:
        exchange = begin(authenticator(), tenant(), is_token=is_token, is_private=True)
        for body in bodies:
            with pytest.raises((CredentialRejected, ProtocolViolation)):
                await exchange.step(body)
        assert exchange.credential is None

    asyncio.run(run())


async def test_failures_throttle_their_source_and_nobody_else() -> None:
    clock = Clock()
    who = authenticator(clock, max_failures=2, failure_interval=60.0)
    someone = tenant("right")
    for _ in range(2):
        with pytest.raises(CredentialRejected):
            await log_in(begin(who, someone), "wrong")
    with pytest.raises(LoginThrottled):
        begin(who, someone)
    await log_in(begin(who, someone, source="198.51.100.1"), "right")
    clock.now += 30.0
    await log_in(begin(who, someone), "right")


async def test_exchanges_begun_before_the_throttle_get_no_more_guesses() -> None:
    who = authenticator(max_failures=2)
    someone = tenant("right")
    refusals: list[type[OgelError]] = []
    begun = [begin(who, someone) for _ in range(5)]
    for exchange in begun:
        with pytest.raises((CredentialRejected, LoginThrottled)) as caught:
            await log_in(exchange, "wrong")
        refusals.append(caught.type)
    assert refusals == [CredentialRejected] * 2 + [LoginThrottled] * 3


async def test_a_violation_is_no_failed_guess() -> None:
    who = authenticator(max_failures=1)
    someone = tenant("right")
    with pytest.raises(ProtocolViolation):
        await begin(who, someone).step(b"nonsense")
    await log_in(begin(who, someone), "right")


class Door:
    """Just enough of a server for libpq: TLS, startup, the exchange, ready."""

    def __init__(self, who: Authenticator, someone: Tenant | None, issued: Issued):
        self._authenticator = who
        self._tenant = someone
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(issued.cert, issued.key)
        certificate = x509.load_pem_x509_certificate(issued.cert.read_bytes())
        self._binding = hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        binding = None
        try:
            packet = await self._packet(reader)
            if packet == (80877103).to_bytes(4, "big"):
                writer.write(b"S")
                await writer.start_tls(self._context)
                binding = self._binding
                packet = await self._packet(reader)
            fields = packet[4:].split(b"\0")
            user = fields[fields.index(b"user") + 1].decode()
            await self._log_in(reader, writer, user, binding)
            await reader.read()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def _log_in(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        user: str,
        binding: bytes | None,
    ) -> None:
        handle, is_token = self._authenticator.split_user(user)
        exchange = self._authenticator.begin(
            self._tenant,
            handle,
            is_token=is_token,
            is_private=binding is not None,
            source=writer.get_extra_info("peername")[0],
            channel_binding=binding,
        )
        self._send(writer, b"R", exchange.start())
        try:
            while exchange.credential is None:
                assert await reader.readexactly(1) == b"p"
                for body in await exchange.step(await self._packet(reader)):
                    self._send(writer, b"R", body)
        except OgelError as error:
            fields = f"SFATAL\0C{error.sqlstate}\0M{error.client_text}\0\0"
            self._send(writer, b"E", fields.encode())
            return
        self._send(writer, b"R", bytes(4))
        self._send(writer, b"Z", b"I")

    @staticmethod
    async def _packet(reader: asyncio.StreamReader) -> bytes:
        size = int.from_bytes(await reader.readexactly(4), "big")
        return await reader.readexactly(size - 4)

    @staticmethod
    def _send(writer: asyncio.StreamWriter, kind: bytes, body: bytes) -> None:
        writer.write(kind + (len(body) + 4).to_bytes(4, "big") + body)


@pytest.mark.parametrize(
    "options",
    [
        {"sslmode": "disable"},
        {"sslmode": "verify-full", "channel_binding": "disable"},
        {"sslmode": "verify-full", "channel_binding": "require"},
    ],
    ids=["clear", "tls", "channel binding"],
)
async def test_libpq_logs_in_by_key(
    authority: Authority, options: dict[str, str]
) -> None:
    key = apikey.generate()
    door = Door(authenticator(), tenant("another", key), authority.issue())
    async with door.open() as port:
        login = {"host": "localhost", "hostaddr": "127.0.0.1", "port": port}
        login |= {"user": "org_a", "sslrootcert": str(authority.cert), **options}
        connection = await asyncio.to_thread(
            psycopg.connect, **login, password=key, connect_timeout=10
        )
        connection.close()
        with pytest.raises(psycopg.OperationalError, match="authentication failed"):
            await asyncio.to_thread(
                psycopg.connect, **login, password="wrong", connect_timeout=10
            )


async def test_libpq_logs_in_by_token(authority: Authority) -> None:
    door = Door(authenticator(), tenant(), authority.issue())
    async with door.open() as port:
        login = {"host": "localhost", "hostaddr": "127.0.0.1", "port": port}
        login |= {"user": "org_a.jwt", "sslrootcert": str(authority.cert)}
        connection = await asyncio.to_thread(
            psycopg.connect,
            **login,
            sslmode="verify-full",
            password=token()[:-1].decode(),
            connect_timeout=10,
        )
        connection.close()


async def test_our_client_logs_in_to_postgres(postgres: Postgres) -> None:
    role = postgres.create_role()
    client = ScramClient(role, postgres.password(role))
    reader, writer = await asyncio.open_connection(postgres.host, postgres.port)
    try:
        body = (196608).to_bytes(4, "big") + b"user\0" + role.encode() + b"\0"
        body += b"database\0postgres\0\0"
        writer.write((len(body) + 4).to_bytes(4, "big") + body)
        assert SCRAM_SHA_256.encode() in await receive(reader, 10)
        send(writer, initial(client.first()))
        challenge = await receive(reader, 11)
        send(writer, client.final(challenge))
        client.verify(await receive(reader, 12))
        assert await receive(reader, 0) == b""
    finally:
        writer.close()
        await writer.wait_closed()


def send(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"p" + (len(body) + 4).to_bytes(4, "big") + body)


async def receive(reader: asyncio.StreamReader, code: int) -> bytes:
    head = await reader.readexactly(5)
    body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
    assert (head[:1], int.from_bytes(body[:4], "big")) == (b"R", code), body
    return body[4:]
