"""Visitor: a client on a plain socket, which costs the machine next to nothing.

Drivers stretch the password at every login, a millisecond beside which no proxy can
be told from another. Here a key is derived once, as a program does that keeps it
(RFC 5802, section 3), and what is left of a login is what the proxy has to do.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit

from ogelproxy.auth.scram import SCRAM_SHA_256, ScramClient, ScramKeys, derive
from ogelproxy.protocol import messages
from ogelproxy.server import SSL_REQUEST

#: A `timeval` of 30 seconds, after which a visitor gives up.
TIMEOUT = struct.pack("ll", 30, 0)
#: The codes of Authentication messages (manual 55.7).
OK, SASL, SASL_CONTINUE, SASL_FINAL = 0, 10, 11, 12
READ_BYTES = 65536


class Refused(Exception):
    """The other side answered with an error."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(f"{fields.get('C')}: {fields.get('M')}")
        self.sqlstate = fields.get("C", "")


@dataclass(frozen=True, slots=True)
class Door:
    """Where visitors come in, as whom; keys that were derived are kept here."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    tls: ssl.SSLContext | None = None
    keys: dict[tuple[bytes, int], ScramKeys] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, url: str, tls: ssl.SSLContext | None = None) -> Self:
        """Read a URL with host, port, user, password and database."""
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        return cls(
            *(parts.hostname, parts.port),
            *(unquote(parts.username or ""), unquote(parts.password or "")),
            *(parts.path.removeprefix("/"), tls),
        )

    def derive(self, salt: bytes, iterations: int) -> ScramKeys:
        keys = self.keys.get((salt, iterations))
        if keys is None:
            keys = self.keys[salt, iterations] = derive(self.password, salt, iterations)
        return keys


class Visitor:
    """One connection, from `enter` to `leave`; everything waits for its answer.

    All methods raise OSError, BlockingIOError after `TIMEOUT`, and `Refused`.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._inbox = b""  # what was read and not taken
        self.has_resumed = False  # whether TLS took up an earlier session
        self.socket: socket.socket | None = None  # from `enter` to `leave`

    def enter(self, session: ssl.SSLSession | None = None) -> Self:
        """Connect and log in; return when a query may be sent.

        With `session` TLS begins where that one ended.
        """
        self.connect(session)
        self._log_in()
        return self

    def connect(self, session: ssl.SSLSession | None = None) -> None:
        """Connect, with TLS where the door has it, and say nothing yet."""
        door = self._door
        self.socket = socket.socket()
        # The kernel's own timeouts: Python's ask before each call whether it may wait.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.socket.setsockopt(socket.SOL_SOCKET, option, TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect((door.host, door.port))
        if door.tls is not None:
            self.socket.sendall(SSL_REQUEST)
            if self.socket.recv(1) != b"S":
                raise ConnectionAbortedError("TLS was refused")
            inside = door.tls.wrap_socket(
                self.socket, server_hostname=door.host, session=session
            )
            self.socket, self.has_resumed = inside, bool(inside.session_reused)

    @property
    def session(self) -> ssl.SSLSession | None:
        """The TLS session, which another visitor may take up if there is one."""
        return self.socket.session if isinstance(self.socket, ssl.SSLSocket) else None

    def _log_in(self) -> None:
        door = self._door
        who = {"user": door.user, "database": door.database}
        self.send(messages.startup(who))
        scram = ScramClient(door.user, door.password)
        while True:
            kind, body = self.receive()
            if kind == b"Z":
                return
            if kind != b"R":
                continue
            code = int.from_bytes(body[:4], "big")
            if code == SASL:
                first = scram.first()
                size = len(first).to_bytes(4, "big")
                name = SCRAM_SHA_256.encode()
                self.send(messages.message(b"p", name + b"\0" + size + first))
            elif code == SASL_CONTINUE:
                keys = door.derive(*scram.challenge(body[4:]))
                self.send(messages.message(b"p", scram.final(body[4:], keys)))
            elif code == SASL_FINAL:
                scram.verify(body[4:])
            elif code != OK:
                raise ConnectionAbortedError(f"asked for authentication {code}")

    def ask(self, sql: str) -> list[list[bytes | None]]:
        """Send a simple query; return its rows when all is answered."""
        self.send(messages.query(sql))
        return self.answer()

    def answer(self) -> list[list[bytes | None]]:
        """Return the rows of what was sent, when all of it is answered."""
        rows = []
        while True:
            kind, body = self.receive()
            if kind == b"D":
                rows.append(messages.read_row(body))
            elif kind == b"Z":
                return rows

    def leave(self) -> None:
        """Say goodbye and close; idempotent."""
        if self.socket is None:
            return
        sock, self.socket = self.socket, None
        with sock, contextlib.suppress(OSError):  # it may have been left first
            sock.sendall(messages.TERMINATE)

    def fileno(self) -> int:
        assert self.socket is not None
        return self.socket.fileno()

    def send(self, data: bytes) -> None:
        assert self.socket is not None
        self.socket.sendall(data)

    def skip(self, size: int) -> None:
        """Wait for `size` bytes whose content is known."""
        assert self.socket is not None and not self._inbox
        while size:
            got = len(self.socket.recv(min(size, READ_BYTES)))
            if not got:
                raise ConnectionResetError("the other side left")
            size -= got

    def receive(self) -> tuple[bytes, bytes]:
        """Wait for one message, as (type, body)."""
        while len(self._inbox) < 5 or len(self._inbox) < self._size():
            self._read()
        size = self._size()
        kind, body = self._inbox[:1], self._inbox[5:size]
        self._inbox = self._inbox[size:]
        if kind == b"E":
            raise Refused(messages.read_fields(body))
        return kind, body

    def _size(self) -> int:
        return 1 + int.from_bytes(self._inbox[1:5], "big")

    def _read(self) -> None:
        assert self.socket is not None
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("the other side left")
        self._inbox += data
