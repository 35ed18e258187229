"""Portals: the extended protocol of what the proxy answers itself.

Statements and portals by the names that a client gave them, as in the manual's
55.2.3. What a statement is, and how its rows are made, is the caller's; statements
take no parameters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ogelproxy.protocol import messages
from ogelproxy.protocol.rows import Column, Value, data_row, row_description

#: Prepared statements of one client, and its portals.
MAX_NAMES = 200

PARSE_COMPLETE = b"1\0\0\0\4"
BIND_COMPLETE = b"2\0\0\0\4"
CLOSE_COMPLETE = b"3\0\0\0\4"
NO_DATA = b"n\0\0\0\4"
NO_PARAMETERS = b"t\0\0\0\6\0\0"
PORTAL_SUSPENDED = b"s\0\0\0\4"


class Refused(Exception):
    """What was asked is answered with an ERROR: five characters, text and hint."""

    def __init__(self, sqlstate: str, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.message = messages.plain_error(sqlstate, text, hint)


class Statement(Protocol):
    """What can be prepared: its columns, None when it returns no rows."""

    @property
    def columns(self) -> Sequence[Column] | None: ...


Prepared = TypeVar("Prepared", bound=Statement)


@dataclass(slots=True)
class Result:
    """What a statement returned; `rows` is consumed."""

    rows: Iterator[Sequence[Value]]
    tag: str  # of its CommandComplete
    notices: Sequence[str] = ()  # told before the rows


@dataclass(slots=True)
class Portal(Generic[Prepared]):
    """A statement that is bound; it runs at its first Execute."""

    statement: Prepared
    formats: Sequence[int]  # a code per column
    result: Result | None = None

    def fetch(self, result: Result, limit: int) -> bytes:
        """Return at most `limit` rows, 0 for all, and what ends them."""
        columns = self.statement.columns or ()
        parts = []
        for row in result.rows:
            parts.append(data_row(columns, row, self.formats))
            if len(parts) == limit:
                return b"".join(parts) + PORTAL_SUSPENDED
        return b"".join(parts) + complete(result.tag)


class Portals(Generic[Prepared]):
    """The statements and portals of one client. Methods may raise Refused."""

    def __init__(self) -> None:
        self._statements: dict[bytes, Prepared] = {}
        self._portals: dict[bytes, Portal[Prepared]] = {}

    def __len__(self) -> int:
        return len(self._statements) + len(self._portals)

    def has_statement(self, name: bytes) -> bool:
        return name in self._statements

    def has_portal(self, name: bytes) -> bool:
        return name in self._portals

    def forget_statement(self, name: bytes) -> None:
        self._statements.pop(name, None)

    def forget_portal(self, name: bytes) -> None:
        self._portals.pop(name, None)

    def forget_portals(self) -> None:
        """As at the end of a transaction."""
        self._portals.clear()

    def clear(self) -> None:
        """As at DISCARD ALL."""
        self._statements.clear()
        self._portals.clear()

    def parse(self, name: bytes, statement: Prepared) -> bytes:
        """Answer a Parse."""
        if name and name in self._statements:
            raise Refused("42P05", f"prepared statement {_quoted(name)} already exists")
        if len(self) >= MAX_NAMES:
            raise Refused("54000", "too many prepared statements and portals")
        self._statements[name] = statement
        return PARSE_COMPLETE

    def bind(self, body: bytes) -> bytes:
        """Answer a Bind."""
        portal, name, rest = body.split(b"\0", 2)
        statement = self._statement(name)
        try:
            formats = _result_formats(rest, len(statement.columns or ()))
        except struct.error:
            raise Refused("08P01", "malformed Bind message") from None
        if portal not in self._portals and len(self) >= MAX_NAMES:
            raise Refused("54000", "too many prepared statements and portals")
        self._portals[portal] = Portal(statement, formats)
        return BIND_COMPLETE

    def describe(self, body: bytes) -> bytes:
        """Answer a Describe."""
        name = body[1:-1]
        if body[:1] == b"P":
            portal = self._portal(name)
            return _description(portal.statement, portal.formats)
        statement = self._statement(name)
        # Formats aren't known yet, so that all are told to be text.
        formats = [0] * len(statement.columns or ())
        return NO_PARAMETERS + _description(statement, formats)

    def execute(self, body: bytes) -> tuple[Portal[Prepared], int]:
        """Return the portal of an Execute, and its limit of rows, 0 for none."""
        name, _, limit = body.partition(b"\0")
        return self._portal(name), int.from_bytes(limit, "big")

    def close(self, body: bytes) -> bytes:
        """Answer a Close; of what isn't there, too (manual 55.2.3)."""
        if body[:1] == b"P":
            self.forget_portal(body[1:-1])
        else:
            self.forget_statement(body[1:-1])
        return CLOSE_COMPLETE

    def _statement(self, name: bytes) -> Prepared:
        found = self._statements.get(name)
        if found is None:
            raise Refused("26000", f"prepared statement {_quoted(name)} does not exist")
        return found

    def _portal(self, name: bytes) -> Portal[Prepared]:
        found = self._portals.get(name)
        if found is None:
            raise Refused("34000", f"portal {_quoted(name)} does not exist")
        return found


def render(columns: Sequence[Column], rows: Iterable[Sequence[Value]]) -> bytes:
    """All rows as text, with their description."""
    formats = [0] * len(columns)
    parts = [data_row(columns, row, formats) for row in rows]
    return row_description(columns, formats) + b"".join(parts)


def complete(tag: str) -> bytes:
    """CommandComplete."""
    return messages.message(b"C", tag.encode() + b"\0")


def _description(statement: Statement, formats: Sequence[int]) -> bytes:
    if statement.columns is None:
        return NO_DATA
    return row_description(statement.columns, formats)


def _result_formats(rest: bytes, count: int) -> Sequence[int]:
    """Read a Bind behind its names: the format of each of `count` columns."""
    (codes,) = struct.unpack_from(">h", rest)
    (parameters,) = struct.unpack_from(">h", rest, 2 + 2 * codes)
    if parameters:
        raise Refused("08P01", f"{parameters} parameters given, none are taken")
    (given,) = struct.unpack_from(">h", rest, 4 + 2 * codes)
    formats = struct.unpack_from(f">{given}h", rest, 6 + 2 * codes)
    if given <= 1:
        formats = (formats or (0,)) * count
    if len(formats) != count or not set(formats) <= {0, 1}:
        raise Refused("08P01", f"formats for {given} of {count} columns")
    return formats


def _quoted(name: bytes) -> str:
    return f'"{name.decode("utf-8", "replace")}"'
