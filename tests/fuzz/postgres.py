"""A model of one Postgres session: what it answers to any bytes of a client.

Follows src/backend/tcop/postgres.c of version 17 in which message is answered by
what, and what becomes of statements, portals and the transaction. SQL is a word or
two: `begin`, `commit`, `rollback`, `copy`, `deallocate all` and `discard all` do
what they say, `wrong` fails when it is parsed, `fail` when it is run, `die` ends
the session, and all else is a query that returns its own text. Settings, and what
the proxy asks of them, are `settings`'.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ogelproxy.protocol.messages import message, parameter_status
from tests.fuzz.settings import REPORTED, Changes, SessionSettings, answer, row_body

#: What a client may send once it has logged in (manual 55.7).
FROM_CLIENT = b"QPBECDSHFXdcf"
EXTENDED = b"PBECDH"
SMALL = b"DECHScf"  # PQ_SMALL_MESSAGE_LIMIT is theirs
MAX_SMALL, MAX_FRAME = 10_001, 1 << 30  # bytes with the type
EXITS = ("commit", "rollback", "end", "abort")
#: What the proxy sends in place of a query that it refuses.
REFUSED = "o7s:refused"


class Failed(Exception):
    """An ErrorResponse."""

    def __init__(self, sqlstate: str, *, severity: str = "ERROR") -> None:
        self.sqlstate = sqlstate
        self.severity = severity


class Impossible(Exception):
    """The proxy sent what no client's bytes can excuse."""


@dataclass(slots=True)
class Portal:
    text: str
    is_done: bool = False
    is_sent: bool = False  # its one row was


class Body:
    """Reads the fields of a message. Raises Failed where they are malformed."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def string(self) -> str:
        end = self.body.find(0, self.at)
        if end < 0:
            raise Failed("08P01")
        start, self.at = self.at, end + 1
        return self.body[start:end].decode("latin-1")

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.body):
            raise Failed("08P01")
        self.at += size
        return self.body[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big", signed=True)

    def end(self) -> None:
        if self.at != len(self.body):
            raise Failed("08P01")


def ends(text: str) -> bool:
    """Whether a statement may run in a failed transaction."""
    return first_word(text) in EXITS


def first_word(text: str) -> str:
    words = text.lower().split()
    return words[0].rstrip(";") if words else ""


def is_well_formed(kind: bytes, body: bytes) -> bool:
    """Whether what names there are in a message can be read."""
    fields = Body(body)
    try:
        match kind:
            case b"P" | b"B":
                fields.string()
                fields.string()
            case b"D" | b"C":
                fields.take(1)
                fields.string()
                fields.end()
            case b"E":
                fields.string()
                fields.number(4)
                fields.end()
    except Failed:
        return False
    return True


class Session:
    """Takes a client's bytes in any pieces, gives a server's.

    `is_strict` is for what the proxy sends: whole frames of known types only.
    `start` are the settings of the start-up packet.
    """

    def __init__(
        self, *, is_strict: bool, start: Mapping[str, str] | None = None
    ) -> None:
        self.is_strict = is_strict
        self.settings = SessionSettings(start or {})
        self.is_closed = False
        self.is_broken = False  # the client broke the protocol
        self.status = b"I"
        self.statements: dict[str, str] = {}
        self.portals: dict[str, Portal] = {}
        self.is_skipping = False  # up to the next Sync
        self.copying = b""  # the type of the message that began a COPY
        self.received = 0
        self._unread = b""
        self._out = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Answer what came."""
        self.received += len(data)
        self._out.clear()
        self._unread += data
        while not self.is_closed and len(self._unread) >= 5:
            size = int.from_bytes(self._unread[1:5], "big") + 1
            kind = self._unread[:1]
            if kind not in FROM_CLIENT or not 5 <= size <= MAX_FRAME:
                if self.is_strict:
                    raise Impossible(f"a message {kind!r} of {size} bytes")
                self._end()
            elif kind == b"X":
                # Whatever length it claims: nobody waits for the rest of a goodbye.
                self.is_closed = True
            elif kind in SMALL and size > MAX_SMALL:
                # Nobody has to know Postgres's limits for Postgres.
                self._end()
            elif size > len(self._unread):
                break
            else:
                body, self._unread = self._unread[5:size], self._unread[size:]
                self._message(kind, body)
        return bytes(self._out)

    def _end(self) -> None:
        self._error(Failed("08P01", severity="FATAL"))
        self.is_closed = True

    def _put(self, kind: bytes, body: bytes = b"") -> None:
        self._out += message(kind, body)

    def _ready(self) -> None:
        """ReadyForQuery, behind what changed of the settings that are reported."""
        if self.settings.has_unreported:
            self._out += parameter_status(REPORTED, self.settings.report())
        self._put(b"Z", self.status)

    def _error(self, failure: Failed) -> None:
        self.is_broken = self.is_broken or failure.sqlstate == "08P01"
        fields = f"S{failure.severity}\0V{failure.severity}\0C{failure.sqlstate}\0M\0\0"
        self._put(b"E", fields.encode())

    def _message(self, kind: bytes, body: bytes) -> None:
        if self.is_skipping and kind != b"S":
            # Nobody has to skip what is none of the protocol's.
            self.is_broken = self.is_broken or not is_well_formed(kind, body)
            return
        try:
            if self.copying:
                self._copy(kind, body)
            elif kind not in b"dcf":
                self._request(kind, body)
        except Failed as failure:
            self._error(failure)
            if failure.severity == "FATAL":
                self.is_closed = True
                return
            self.settings.roll_back()
            began = self.copying or kind
            self.copying = b""
            if self.status == b"T":
                self.status = b"E"
            self._end_transaction()
            if began in EXTENDED:
                self.is_skipping = True
            else:
                self._ready()

    def _end_transaction(self) -> None:
        # A failed block keeps nothing that could be run but its end.
        if self.status != b"T":
            self.portals.clear()
            self.settings.commit()

    def _copy(self, kind: bytes, body: bytes) -> None:
        if kind in b"dHS":
            return
        if kind == b"f":
            raise Failed("57014")
        if kind != b"c":
            raise Failed("08P01")
        began, self.copying = self.copying, b""
        self._put(b"C", b"COPY 1\0")
        if began == b"Q":
            self._end_transaction()
            self._ready()

    def _request(self, kind: bytes, body: bytes) -> None:
        fields = Body(body)
        match kind:
            case b"Q":
                text = fields.string()
                fields.end()
                self.statements.pop("", None)
                if self._parsed(text):
                    self._run(text, b"Q")
                else:
                    self._put(b"I")
                if not self.copying:
                    self._end_transaction()
                    self._ready()
            case b"F":
                if self.status == b"E":
                    raise Failed("25P02")
                self._put(b"V", struct.pack(">i", -1))
                self._end_transaction()
                self._ready()
            case b"P":
                self._parse(fields)
            case b"B":
                self._bind(fields)
            case b"D":
                self._describe(fields)
            case b"E":
                self._execute(fields)
            case b"C":
                self._close(fields)
            case b"S":
                fields.end()
                self.is_skipping = False
                self._end_transaction()
                self._ready()
            case b"H":
                fields.end()

    def _check_state(self, text: str) -> None:
        if self.status == b"E" and not ends(text):
            raise Failed("25P02")

    def _parsed(self, text: str) -> bool:
        """Whether there is a statement in it."""
        if "wrong" in text or text == REFUSED:
            raise Failed("42601")
        return bool(text.strip(" \t\n\r\f\v;"))

    def _parse(self, fields: Body) -> None:
        name, text = fields.string(), fields.string()
        for _ in range(fields.number(2)):
            fields.take(4)
        fields.end()
        if not name:
            self.statements.pop("", None)
        if self._parsed(text):
            self._check_state(text)
        if name in self.statements:
            raise Failed("42P05")
        self.statements[name] = text
        self._put(b"1")

    def _statement(self, name: str) -> str:
        if name not in self.statements:
            raise Failed("26000")
        return self.statements[name]

    def _bind(self, fields: Body) -> None:
        portal, text = fields.string(), self._statement(fields.string())
        for _ in range(fields.number(2)):
            fields.take(2)
        for _ in range(fields.number(2)):
            size = fields.number(4)
            if size != -1:
                fields.take(size)
        if text.strip():
            self._check_state(text)
        if portal and portal in self.portals:
            raise Failed("42P03")
        for _ in range(fields.number(2)):
            fields.take(2)
        fields.end()
        self.portals[portal] = Portal(text)
        self._put(b"2")

    def _describe(self, fields: Body) -> None:
        what, name = fields.take(1), fields.string()
        fields.end()
        if what == b"S":
            text = self._statement(name)
            self._check_state(text)
            self._put(b"t", b"\0\0")
        elif what == b"P":
            text = self._portal(name).text
            self._check_state(text)
        else:
            raise Failed("08P01")
        self._put(*describe(text))

    def _portal(self, name: str) -> Portal:
        if name not in self.portals:
            raise Failed("34000")
        return self.portals[name]

    def _execute(self, fields: Body) -> None:
        name, limit = fields.string(), fields.number(4)
        fields.end()
        portal = self._portal(name)
        if not self._parsed(portal.text):
            self._put(b"I")
            return
        self._check_state(portal.text)
        is_query = describe(portal.text)[0] == b"T"
        if portal.is_done and not is_query:
            raise Failed("55000")
        if is_query and portal.is_sent:
            portal.is_done = True
            self._put(b"C", b"SELECT 0\0")
        elif is_query and limit == 1 and "fail" not in portal.text:
            portal.is_sent = True
            self._put(*self._row(portal.text))
            self._put(b"s")
        else:
            portal.is_done = portal.is_sent = True
            self._run(portal.text, b"E")

    def _close(self, fields: Body) -> None:
        what, name = fields.take(1), fields.string()
        fields.end()
        if what == b"S":
            self.statements.pop(name, None)
        elif what == b"P":
            self.portals.pop(name, None)
        else:
            raise Failed("08P01")
        self._put(b"3")

    def _run(self, text: str, kind: bytes) -> None:
        self._check_state(text)
        word = first_word(text)
        changes = Changes.read(text)
        if self.is_strict and (fields := answer(text, self.settings)) is not None:
            self._put(b"D", fields)
            self._put(b"C", b"SELECT 1\0")
            return
        if "die" in text:
            raise Failed("57P01", severity="FATAL")
        if "fail" in text:
            raise Failed("22012")
        if word == "copy":
            self.copying = kind
            self._put(b"G", b"\0\0\0")
        elif word == "begin":
            self.status = b"T"
            self._put(b"C", b"BEGIN\0")
        elif word in EXITS:
            is_commit = word in ("commit", "end") and self.status != b"E"
            self.status = b"I"
            if is_commit:
                self.settings.commit()
            else:
                self.settings.roll_back()
            self.portals.clear()
            self._put(b"C", b"COMMIT\0" if is_commit else b"ROLLBACK\0")
        elif text.lower() in ("discard all", "deallocate all"):
            if text.lower() == "discard all" and self.status == b"T":
                raise Failed("25001")
            self.statements.clear()
            if text.lower() == "discard all":
                self.settings.reset_all()
            self._put(b"C", text.upper().encode() + b"\0")
        elif changes is not None:
            self.settings.change(changes, is_in_block=self.status == b"T")
            self._put(b"C", changes.tag)
        else:
            if kind == b"Q":
                self._put(*describe(text))
            self._put(*self._row(text))
            self._put(b"C", b"SELECT 1\0")

    def _row(self, text: str) -> tuple[bytes, bytes]:
        """What a query returns: its text, or the setting that it is to show."""
        shown = self.settings.shown(text)
        return b"D", row_body([text if shown is None else shown])


def describe(text: str) -> tuple[bytes, bytes]:
    """RowDescription for what returns rows, or NoData."""
    word = first_word(text)
    is_query = Changes.read(text) is None and (
        word not in ("", "begin", "copy", "discard", "deallocate", *EXITS)
    )
    return (b"T", b"\0\0") if is_query else (b"n", b"")
