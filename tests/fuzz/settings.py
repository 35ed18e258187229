"""Settings of a model of a Postgres session, and what the proxy asks of them.

There are five, of which clients change one by one statement: `set [local] a = b`,
`set a to default`, `reset a`, `reset all`; and `show a` returns it. The proxy's own
statements are those of `ogelproxy.sessions`, several in one message.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ogelproxy import sessions

#: The one that Postgres tells of whenever it changes.
REPORTED = "application_name"

NAME = rf"(?P<name>[abc]|a\.b|{REPORTED})"
SPACE = "[ \t\r\n]"
SET = re.compile(
    rf"set{SPACE}+(?:session{SPACE}+|(?P<local>local){SPACE}+)?{NAME}"
    rf"(?:{SPACE}*={SPACE}*|{SPACE}+to{SPACE}+)(?P<value>[a-z0-9]+)",
    re.I | re.A,
)
RESET = re.compile(rf'reset{SPACE}+(?:"?{NAME}"?|(?P<all>all))', re.I | re.A)
SHOW = re.compile(rf"show{SPACE}+{NAME}", re.I | re.A)
LITERAL = r"E'((?:[^'\\]|''|\\.)*)'"
#: Of what the proxy sends.
SWITCH = re.compile(rf"set_config\({LITERAL}, {LITERAL}, false\)")
RESTORE = "SELECT pg_catalog.set_config(s.name, s.value, false) FROM (VALUES "
RESTORED = re.compile(rf"\({LITERAL}, {LITERAL}\)")
ASKED = re.compile(rf"current_setting\({LITERAL}, true\), 'UTF8'")
QUESTIONS = ("EXISTS (SELECT", "CASE WHEN E'", "pg_catalog.encode(")


@dataclass(frozen=True, slots=True)
class Changes:
    """What one statement changes: None is the default."""

    values: Mapping[str, str | None]
    is_local: bool
    is_all: bool  # those that aren't named go to their default
    tag: bytes

    @classmethod
    def read(cls, text: str) -> Changes | None:
        """Read a statement; None when it changes nothing."""
        if found := SET.fullmatch(text):
            name, value = found["name"].lower(), found["value"]
            known = None if value.lower() == "default" else value
            return cls({name: known}, bool(found["local"]), False, b"SET\0")
        if found := RESET.fullmatch(text):
            if found["all"]:
                return cls({}, False, True, b"RESET\0")
            return cls({found["name"].lower(): None}, False, False, b"RESET\0")
        return None


class SessionSettings:
    """The settings that differ from those of a new session without any asked for."""

    def __init__(self, start: Mapping[str, str]) -> None:
        self.start = dict(start)
        self.session: dict[str, str] = {}  # set in it
        self.local: dict[str, str | None] = {}  # until the transaction ends
        self.was_start_reset = False  # one of the start-up packet
        self._before: dict[str, str] = {}  # what a rollback leads back to
        self._reported = self.value(REPORTED)

    def value(self, name: str) -> str | None:
        if self.local.get(name) is not None:
            return self.local[name]
        if name in self.local:
            return self.start.get(name)
        return self.session.get(name, self.start.get(name))

    def change(self, changes: Changes, *, is_in_block: bool) -> None:
        if changes.is_local:
            if is_in_block:
                self.local.update(changes.values)
            return
        if changes.is_all:
            self.reset_all()
        for name, value in changes.values.items():
            self.was_start_reset |= value is None and name in self.start
            self.local.pop(name, None)
            self.session.pop(name, None)
            if value is not None:
                self.session[name] = value

    def reset_all(self) -> None:
        self.was_start_reset |= bool(self.start)
        self.session.clear()
        self.local.clear()

    def commit(self) -> None:
        self.local.clear()
        self._before = dict(self.session)

    def roll_back(self) -> None:
        self.local.clear()
        self.session = dict(self._before)

    def shown(self, text: str) -> str | None:
        """What a SHOW returns; None for what isn't one."""
        found = SHOW.fullmatch(text)
        return (self.value(found["name"].lower()) or "") if found else None

    @property
    def has_unreported(self) -> bool:
        return self.value(REPORTED) != self._reported

    def report(self) -> str:
        self._reported = self.value(REPORTED)
        return self._reported or ""


def row_body(fields: Sequence[str | None]) -> bytes:
    """The body of a DataRow."""
    body = struct.pack(">h", len(fields))
    for field in fields:
        value = b"" if field is None else field.encode("latin-1")
        body += struct.pack(">i", -1 if field is None else len(value)) + value
    return body


def answer(text: str, settings: SessionSettings) -> bytes | None:
    """Run a statement of the proxy's own; return a row, None for a client's."""
    if text.startswith(RESTORE):
        for name, value in RESTORED.findall(text):
            settings.session.setdefault(name, value)
        return row_body([None])
    if text.startswith(("SET SESSION AUTHORIZATION DEFAULT;RESET ALL", "CLOSE ALL;")):
        settings.reset_all()
        return row_body([None])
    question = text.removeprefix(sessions.CHANGED).removeprefix("SELECT ")
    if question.startswith(QUESTIONS):
        return row_body(_fields(text, settings))
    if text.startswith(('RESET "', "SELECT pg_catalog.set_config(")):
        for statement in text.partition("SELECT")[0].split(";"):
            if reset := RESET.fullmatch(statement):
                settings.session.pop(reset["name"], None)
        settings.session.update(SWITCH.findall(text))
        return row_body([None])
    return None


def _fields(text: str, settings: SessionSettings) -> list[str | None]:
    asked = ASKED.findall(text)
    pins = ["f" for _, check in sessions.PINS.values() if check in text]
    if "<> ALL (ARRAY[" in text:
        pins.append("t" if settings.session.keys() - set(asked) else "f")
    values = map(settings.value, asked)
    return [*pins, *(value and value.encode().hex() for value in values)]
