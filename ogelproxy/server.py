"""Open one Postgres connection: connect, TLS, log in, learn its parameters.

`Server` adds to the compiled `ServerCore` what happens once in a connection's
life. Which server is lent to whom is `pool`'s; what it answers is `_server`'s.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from ogelproxy._connection import Connection
from ogelproxy._server import ServerCore
from ogelproxy.auth.certificate import end_point
from ogelproxy.auth.scram import (
    SCRAM_SHA_256_PLUS,
    ScramClient,
    ScramKeys,
    derive,
    md5_password,
)
from ogelproxy.config import Secret
from ogelproxy.errors import (
    NotSupported,
    ProtocolViolation,
    TargetFull,
    TargetUnreachable,
)
from ogelproxy.protocol import hello, messages

if TYPE_CHECKING:
    from ogelproxy.pool import Pool

#: Largest message that a server may send before it is ready.
MAX_LOGIN_MESSAGE = 65_536
#: Settings with which Postgres would end strings, and statements, elsewhere than
#: the scanner does. In these encodings a character may hold a backslash (manual
#: 23.3.1); Postgres converts them before it reads SQL.
MISLEADING = frozenset(
    [("standard_conforming_strings", "off")]
    + [
        ("client_encoding", encoding)
        for encoding in "SJIS SHIFT_JIS_2004 BIG5 GBK GB18030 UHC JOHAB".split()
    ]
)
SSL_REQUEST = struct.pack(">ii", 8, 80877103)

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

#: Bytes of a server's cancel key (manual 55.7, BackendKeyData).
CANCEL_KEY_BYTES = range(4, 257)

#: With these, or without a word, end servers that know no protocol but 3.0: Postgres
#: before 2018, and poolers.
VERSION_REFUSED = ("0A000", "08P01")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Postgres is and how to log in, read from a connection string."""

    host: str  # a directory with the server's socket when it starts with /
    port: int
    user: str
    database: str
    password: Secret = field(repr=False)
    sslmode: str
    sslrootcert: str | None
    sslcert: str | None
    sslkey: str | None
    channel_binding: str

    @classmethod
    def parse(cls, dsn: str) -> Address:
        """Read a `postgresql://` URL (manual 34.1.1.2).

        Raises TargetUnreachable when it is another one, or a word in it is not
        known.
        """
        url = urlsplit(dsn)
        if url.scheme not in ("postgres", "postgresql"):
            raise TargetUnreachable("connection string is not a postgresql:// URL")
        query = dict(parse_qsl(url.query))
        user = unquote(url.username or query.get("user", "postgres"))
        sslmode = query.get("sslmode", "prefer")
        if sslmode not in SSL_MODES:
            raise TargetUnreachable(f"sslmode {sslmode!r} is not known")
        channel_binding = query.get("channel_binding", "prefer")
        if channel_binding not in ("disable", "prefer", "require"):
            raise TargetUnreachable(f"channel_binding {channel_binding!r} is not known")
        return cls(
            host=query.get("host") or unquote(url.hostname or "127.0.0.1"),
            port=int(query.get("port") or url.port or 5432),
            user=user,
            database=unquote(url.path[1:]) or query.get("dbname", user),
            password=Secret(unquote(url.password or query.get("password", ""))),
            sslmode=sslmode,
            sslrootcert=query.get("sslrootcert"),
            sslcert=query.get("sslcert"),
            sslkey=query.get("sslkey"),
            channel_binding=channel_binding,
        )

    def tls_context(self) -> ssl.SSLContext | None:
        """The TLS context that `sslmode` asks for (manual 34.19), or None.

        As in libpq, `require` verifies too where authorities are named. Raises
        OSError when a certificate or key can't be read.
        """
        if self.sslmode in ("disable", "allow") or self.host.startswith("/"):
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.sslmode == "verify-full"
        is_named = self.sslrootcert not in (None, "system")
        if self.sslmode == "prefer" or (self.sslmode == "require" and not is_named):
            context.verify_mode = ssl.CERT_NONE
        elif is_named:
            context.load_verify_locations(self.sslrootcert)
        else:
            context.load_default_certs()
        context.set_alpn_protocols([hello.POSTGRESQL.decode()])
        if self.sslcert is not None:
            # Without a password of our own OpenSSL would ask the terminal for one.
            context.load_cert_chain(self.sslcert, self.sslkey, password="")
        return context

    async def connect(self) -> socket.socket:
        """Open a non-blocking socket. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.host.startswith("/"):
            path = f"{self.host}/.s.PGSQL.{self.port}"
            places: list[tuple[int, Any]] = [(socket.AF_UNIX, path)]
        else:
            places = [
                (family, address)
                for family, _, _, _, address in await loop.getaddrinfo(
                    self.host, self.port, type=socket.SOCK_STREAM
                )
            ]
        failure: OSError = OSError("no address")
        for family, address in places:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
                continue
            except BaseException:
                sock.close()
                raise
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        raise failure


class Memory:
    """What is remembered of one target from connection to connection.

    `minor` is the minor version of the protocol to ask for. SCRAM keys are stretched
    once and off the loop.
    """

    def __init__(self) -> None:
        self.minor = messages.LATEST_MINOR
        self._known: tuple[bytes, int, ScramKeys] | None = None

    async def keys(self, password: str, salt: bytes, iterations: int) -> ScramKeys:
        known = self._known
        if known is None or known[:2] != (salt, iterations):
            keys = await asyncio.to_thread(derive, password, salt, iterations)
            known = self._known = (salt, iterations, keys)
        return known[2]


class _VersionRefused(Exception):
    """The server ended the connection over the version that was asked for."""


class Server(ServerCore):
    """A server connection, from its socket to its place in the pool."""

    pool: Pool
    statuses: dict[str, str]

    @classmethod
    async def open(cls, pool: Pool, parameters: Mapping[str, str]) -> Server:
        """Connect and log in to the pool's target; not yet in the pool.

        Raises TargetUnreachable; the log text names the address, the client's
        text never does.
        """
        memory = pool.memory
        try:
            return await cls._open(pool, parameters, memory.minor)
        except _VersionRefused:
            server = await cls._open(pool, parameters, 0)
            memory.minor = 0
            return server

    @classmethod
    async def _open(
        cls, pool: Pool, parameters: Mapping[str, str], minor: int
    ) -> Server:
        address = pool.address
        try:
            sock = await address.connect()
        except OSError as error:
            raise TargetUnreachable(
                f"{address.host}:{address.port}: {error}"
            ) from error
        server = cls(pool.host.reactor, sock.detach(), pool.host, pool)
        server.statuses = {}
        try:
            await server._log_in(address, parameters, pool.memory, minor)
        except (OSError, ProtocolViolation) as error:
            server.close()
            raise TargetUnreachable(
                f"{address.host}:{address.port}: {error}"
            ) from error
        except BaseException:
            server.close()
            raise
        return server

    async def _log_in(
        self,
        address: Address,
        parameters: Mapping[str, str],
        memory: Memory,
        minor: int,
    ) -> None:
        context = address.tls_context()
        if context is not None:
            await ask_for_tls(
                self, address, context, may_do_without=address.sslmode == "prefer"
            )
        self.send(
            messages.startup(
                {"user": address.user, "database": address.database, **parameters},
                minor=minor,
            )
        )
        first = await self._first_answer(minor)
        await self._authenticate(address, memory, first)
        while True:
            kind, body = await self.receive_message()
            if kind == b"Z":
                return
            if kind == b"S":
                self._note_status(body)
            elif kind == b"K":
                if len(body) - 4 not in CANCEL_KEY_BYTES:
                    raise ProtocolViolation("impossible cancel key", by="server")
                self.process_id = int.from_bytes(body[:4], "big")
                self.cancel_key = body[4:]
            elif kind == b"E":
                self._refused(body)

    async def _first_answer(self, minor: int) -> tuple[bytes, bytes]:
        """Wait for what follows the StartupMessage, agreed on a version."""
        try:
            kind, body = await self.receive_message()
        except ConnectionResetError:
            if minor:
                raise _VersionRefused from None
            raise
        if kind == b"E" and minor:
            if messages.read_fields(body).get("C") in VERSION_REFUSED:
                raise _VersionRefused
        elif kind == b"v":
            # An older version serves as well; options were not asked for. Some say
            # the minor version alone.
            version, options = struct.unpack_from(">II", body.ljust(8, b"\xff"))
            if version & 0xFFFF >= minor or options:
                raise ProtocolViolation("impossible negotiation", by="server")
            return await self.receive_message()
        return kind, body

    async def _authenticate(
        self, address: Address, memory: Memory, first: tuple[bytes, bytes]
    ) -> None:
        password = address.password.get_secret_value()
        needs_binding = address.channel_binding == "require"
        scram: ScramClient | None = None
        is_proven = False  # the server showed that it knows the password too
        kind, body = first
        while True:
            if kind == b"E":
                self._refused(body)
            if kind != b"R" or len(body) < 4:
                raise ProtocolViolation("expected Authentication", by="server")
            code, data = int.from_bytes(body[:4], "big"), body[4:]
            if needs_binding and code not in (0, 10, 11, 12):
                raise TargetUnreachable(f"{address.host}: no channel binding there")
            if code == 0:
                if not is_proven and (needs_binding or scram is not None):
                    raise TargetUnreachable(f"{address.host}: login was not proven")
                return
            if code == 3:
                if self.tls is None and not is_local(address.host):
                    raise TargetUnreachable(
                        f"{address.host} asks for a clear password without TLS"
                    )
                self._answer(password.encode() + b"\0")
            elif code == 5:
                hashed = md5_password(address.user, password, data)
                self._answer(hashed if hashed.endswith(b"\0") else hashed + b"\0")
            elif code == 10:
                scram = ScramClient(
                    address.user,
                    password,
                    offered=data.decode("ascii", "replace").split("\0"),
                    channel_binding=self._channel_binding(address),
                )
                if needs_binding and scram.mechanism != SCRAM_SHA_256_PLUS:
                    raise TargetUnreachable(f"{address.host}: no channel binding there")
                start = scram.first()
                self._answer(
                    scram.mechanism.encode()
                    + b"\0"
                    + len(start).to_bytes(4, "big")
                    + start
                )
            elif code == 11 and scram is not None:
                salt, iterations = scram.challenge(data)
                keys = await memory.keys(password, salt, iterations)
                self._answer(scram.final(data, keys))
            elif code == 12 and scram is not None:
                scram.verify(data)
                is_proven = True
            else:
                raise TargetUnreachable(
                    f"{address.host}: authentication method {code} is not known"
                )
            kind, body = await self.receive_message()

    def _channel_binding(self, address: Address) -> bytes | None:
        """The hash of the server's certificate, if SCRAM is to be bound to it."""
        if self.tls is None or address.channel_binding == "disable":
            return None
        encoded = self.tls.getpeercert(binary_form=True)
        assert encoded is not None  # a TLS server always shows one
        try:
            return end_point(x509.load_der_x509_certificate(encoded))
        except (ValueError, UnsupportedAlgorithm):
            return None  # a certificate that OpenSSL alone can read

    def _answer(self, body: bytes) -> None:
        self.send(messages.message(b"p", body))

    def _refused(self, body: bytes) -> None:
        fields = messages.read_fields(body)
        text = f"login refused: {fields.get('C')} {fields.get('M')}"
        kind = TargetFull if fields.get("C") == "53300" else TargetUnreachable
        raise kind(text, said=fields)

    def _note_status(self, body: bytes) -> None:
        match messages.read_strings(body):
            case [name, value]:
                self.statuses[name] = value
            case _:
                raise ProtocolViolation("malformed ParameterStatus", by="server")

    async def receive_message(self) -> tuple[bytes, bytes]:
        """Wait for one message; only while a coroutine owns the server."""
        while (taken := self.take_message(MAX_LOGIN_MESSAGE)) is None:
            await self.more()
        return taken

    async def run(self, message: bytes) -> dict[str, str] | None:
        """Run a query of the proxy's own before the server is in its pool.

        Returns the fields of the error that it failed with, or None.
        """
        failure = None
        self.send(message)
        while True:
            kind, body = await self.receive_message()
            if kind == b"Z":
                return failure
            if kind == b"E":
                failure = messages.read_fields(body)
            elif kind == b"S":
                self._note_status(body)


async def ask_for_tls(
    connection: Connection,
    address: Address,
    context: ssl.SSLContext,
    *,
    may_do_without: bool,
) -> None:
    """Put TLS around a connection to `address`, before anything else is sent.

    Raises TargetUnreachable when the server has none and it is needed; OSError.
    """
    connection.send(SSL_REQUEST)
    while (answer := connection.take(1)) is None:
        await connection.more()
    if answer == b"S":
        await connection.start_tls(
            context, server_side=False, server_hostname=address.host
        )
    elif not may_do_without:
        raise TargetUnreachable(f"{address.host}:{address.port}: no TLS there")


def misleading() -> NotSupported:
    """The refusal of a session that has one of the MISLEADING settings."""
    return NotSupported(
        "a client_encoding in which a character may hold a backslash, "
        "or standard_conforming_strings = off,",
        hint="use client_encoding UTF8 and standard_conforming_strings on",
    )


def is_local(host: str) -> bool:
    """Whether bytes to `host` stay on this machine."""
    return host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")
