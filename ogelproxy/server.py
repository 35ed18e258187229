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

from ogelproxy._server import ServerCore
from ogelproxy.auth.scram import ScramClient, ScramKeys, derive, md5_password
from ogelproxy.config import Secret
from ogelproxy.errors import (
    NotSupported,
    ProtocolViolation,
    TargetFull,
    TargetUnreachable,
)
from ogelproxy.protocol import messages

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

    @classmethod
    def parse(cls, dsn: str) -> Address:
        """Read a `postgresql://` URL (manual 34.1.1.2)."""
        url = urlsplit(dsn)
        if url.scheme not in ("postgres", "postgresql"):
            raise TargetUnreachable("connection string is not a postgresql:// URL")
        query = dict(parse_qsl(url.query))
        user = unquote(url.username or query.get("user", "postgres"))
        return cls(
            host=query.get("host") or unquote(url.hostname or "127.0.0.1"),
            port=int(query.get("port") or url.port or 5432),
            user=user,
            database=unquote(url.path[1:]) or query.get("dbname", user),
            password=Secret(unquote(url.password or query.get("password", ""))),
            sslmode=query.get("sslmode", "prefer"),
            sslrootcert=query.get("sslrootcert"),
        )

    def tls_context(self) -> ssl.SSLContext | None:
        """The TLS context that `sslmode` asks for (manual 34.19), or None."""
        if self.sslmode in ("disable", "allow") or self.host.startswith("/"):
            return None
        context = ssl.create_default_context(cafile=self.sslrootcert)
        if self.sslmode != "verify-full":
            context.check_hostname = False
        if self.sslmode in ("prefer", "require"):
            context.verify_mode = ssl.CERT_NONE
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


class KeyCache:
    """SCRAM keys towards one target, stretched once and off the loop."""

    def __init__(self) -> None:
        self._known: tuple[bytes, int, ScramKeys] | None = None

    async def keys(self, password: str, salt: bytes, iterations: int) -> ScramKeys:
        known = self._known
        if known is None or known[:2] != (salt, iterations):
            keys = await asyncio.to_thread(derive, password, salt, iterations)
            known = self._known = (salt, iterations, keys)
        return known[2]


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
            await server._log_in(address, parameters, pool.key_cache)
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
        self, address: Address, parameters: Mapping[str, str], cache: KeyCache
    ) -> None:
        context = address.tls_context()
        if context is not None:
            await self._ask_for_tls(address, context)
        self.send(
            messages.startup(
                {"user": address.user, "database": address.database, **parameters}
            )
        )
        await self._authenticate(address, cache)
        while True:
            kind, body = await self.receive_message()
            if kind == b"Z":
                return
            if kind == b"S":
                self._note_status(body)
            elif kind == b"K":
                self.process_id = int.from_bytes(body[:4], "big")
                self.cancel_key = body[4:]
            elif kind == b"E":
                self._refused(body)

    async def _ask_for_tls(self, address: Address, context: ssl.SSLContext) -> None:
        self.send(SSL_REQUEST)
        while (answer := self.take(1)) is None:
            await self.more()
        if answer == b"S":
            await self.start_tls(
                context, server_side=False, server_hostname=address.host
            )
        elif address.sslmode != "prefer":
            raise TargetUnreachable(f"{address.host}:{address.port}: no TLS there")

    async def _authenticate(self, address: Address, cache: KeyCache) -> None:
        password = address.password.get_secret_value()
        scram: ScramClient | None = None
        while True:
            kind, body = await self.receive_message()
            if kind == b"E":
                self._refused(body)
            if kind != b"R" or len(body) < 4:
                raise ProtocolViolation("expected Authentication", by="server")
            code, data = int.from_bytes(body[:4], "big"), body[4:]
            if code == 0:
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
                if b"SCRAM-SHA-256" not in data.split(b"\0"):
                    raise TargetUnreachable(f"{address.host}: no common SASL mechanism")
                scram = ScramClient(address.user, password)
                first = scram.first()
                self._answer(b"SCRAM-SHA-256\0" + len(first).to_bytes(4, "big") + first)
            elif code == 11 and scram is not None:
                salt, iterations = scram.challenge(data)
                keys = await cache.keys(password, salt, iterations)
                self._answer(scram.final(data, keys))
            elif code == 12 and scram is not None:
                scram.verify(data)
            else:
                raise TargetUnreachable(
                    f"{address.host}: authentication method {code} is not known"
                )

    def _answer(self, body: bytes) -> None:
        self.send(messages.message(b"p", body))

    def _refused(self, body: bytes) -> None:
        fields = messages.read_fields(body)
        text = f"login refused: {fields.get('C')} {fields.get('M')}"
        raise (TargetFull if fields.get("C") == "53300" else TargetUnreachable)(text)

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
