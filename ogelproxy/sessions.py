"""Session state: what of it follows a client, and what pins it to its server.

Settings follow: which ones a client may have changed is read from its statements,
their values are asked of the server when the loan ends, and whichever server comes
next is given the same. The rest can't be carried: while there is any, the client
keeps its server (auto mode), or it goes with the loan (transaction mode). No
sockets here: questions as messages, answers as rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ogelproxy._fingerprint import Flag
from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol import messages

#: Settings that are followed for one client; one that changes more is pinned.
MAX_FOLLOWED = 64
MAX_FOLLOWED_BYTES = 65_536

#: State by its flag: why a client is pinned, and how its server tells that it is.
#: Every object in the temporary schema depends on it (manual 52.18), which is
#: found by an index. Outside a transaction only session-level locks and cursors
#: WITH HOLD are left.
PINS: dict[Flag, tuple[str, str]] = {
    Flag.TEMP: (
        "temporary objects",
        "EXISTS (SELECT FROM pg_catalog.pg_depend "
        "WHERE refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass "
        "AND refobjid = pg_catalog.pg_my_temp_schema())",
    ),
    Flag.LISTEN: ("LISTEN", "EXISTS (SELECT pg_catalog.pg_listening_channels())"),
    Flag.ADVISORY: (
        "advisory locks",
        "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' "
        "AND pid = pg_catalog.pg_backend_pid())",
    ),
    Flag.HOLD: ("cursors WITH HOLD", "EXISTS (SELECT FROM pg_catalog.pg_cursors)"),
    Flag.PREPARE: (
        "PREPARE",
        "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements "
        "WHERE from_sql AND name NOT LIKE 'o7s\\_%')",
    ),
}

#: What nothing but the end of the server takes away, and what can't be known.
LASTING: dict[Flag, str] = {
    Flag.LOAD: "LOAD",
    Flag.ANY_SETTING: "settings that can't be followed",
    Flag.SEQUENCE: "currval or lastval",
    Flag.SEED: "setseed",
}

LASTING_FLAGS = Flag.LOAD | Flag.ANY_SETTING | Flag.SEQUENCE | Flag.SEED
SETTING = Flag.SET | Flag.SET_CONFIG | Flag.ROLE | Flag.ANY_SETTING

#: What ends a kind of state; DDL may drop a temporary table.
ENDING: dict[Flag, Flag] = {
    Flag.DDL: Flag.TEMP,
    Flag.UNLISTEN: Flag.LISTEN,
    Flag.ADVISORY_UNLOCK: Flag.ADVISORY,
    Flag.CLOSE: Flag.HOLD,
    Flag.DEALLOCATE: Flag.PREPARE,
    Flag.DISCARD: Flag.TEMP | Flag.LISTEN | Flag.ADVISORY | Flag.HOLD | Flag.PREPARE,
}

#: How each kind of state is taken from a server, in DISCARD's order (manual).
RESETS: tuple[tuple[Flag, str], ...] = (
    (Flag.HOLD, "CLOSE ALL"),
    (SETTING, "SET SESSION AUTHORIZATION DEFAULT;RESET ALL"),
    (Flag.LISTEN, "UNLISTEN *"),
    (Flag.ADVISORY, "SELECT pg_catalog.pg_advisory_unlock_all()"),
    (Flag.TEMP, "DISCARD TEMP"),
    (Flag.SEQUENCE, "DISCARD SEQUENCES"),
)
#: What the session changed; names with a dot and two more are not listed there.
CHANGED = (
    "WITH changed AS MATERIALIZED (SELECT pg_catalog.lower(name) AS name "
    "FROM pg_catalog.pg_settings WHERE source = 'session') "
)
#: Of them the first undoes the second.
ROLES = ("session_authorization", "role")
STATEMENTS = Flag.PREPARE | Flag.DEALLOCATE | Flag.DISCARD | Flag.OPAQUE


def reasons(flags: int) -> tuple[str, ...]:
    """Say in words what pins a client."""
    named = {flag: text for flag, (text, _) in PINS.items()} | LASTING
    return tuple(text for flag, text in named.items() if flags & flag)


@dataclass(frozen=True, slots=True)
class Question:
    """What a server is asked about a session's state."""

    pins: tuple[Flag, ...]
    settings: tuple[str, ...]

    #: Whether statements failed, so that a setting named in one may be as it was.
    #: To set it, if only to what it is, may not be allowed.
    is_doubtful: bool = False

    @classmethod
    def about(
        cls, pins: int, settings: Iterable[str], *, is_doubtful: bool
    ) -> Question | None:
        """Ask for the state of these flags, and for settings; None for neither."""
        asked = tuple(flag for flag in (*PINS, Flag.ANY_SETTING) if pins & flag)
        names = tuple(settings)
        return cls(asked, names, is_doubtful) if asked or names else None

    def message(self) -> bytes:
        """The Query message that asks it: one row."""
        checks = [self._check(flag) for flag in self.pins]
        values = [self._value(name) for name in self.settings]
        known = CHANGED if self.settings and self.is_doubtful else ""
        return messages.query(f"{known}SELECT {', '.join(checks + values)}")

    def _check(self, flag: Flag) -> str:
        if flag is not Flag.ANY_SETTING:
            return PINS[flag][1]
        names = ", ".join(map(quote, self.settings))
        return (
            "EXISTS (SELECT FROM pg_catalog.pg_settings WHERE source = 'session' "
            f"AND pg_catalog.lower(name) <> ALL (ARRAY[{names}]::pg_catalog.text[]))"
        )

    def _value(self, name: str) -> str:
        # In ASCII, whatever the client's encoding is.
        value = (
            "pg_catalog.encode(pg_catalog.convert_to("
            f"pg_catalog.current_setting({quote(name)}, true), 'UTF8'), 'hex')"
        )
        if not self.is_doubtful or name in ROLES or "." in name:
            return value
        return f"CASE WHEN {quote(name)} IN (SELECT name FROM changed) THEN {value} END"

    def read(self, row: bytes) -> tuple[int, dict[str, str | None]]:
        """Read the body of the answering DataRow: pins left, and values."""
        try:
            fields = messages.read_row(row)
            pins = 0
            for flag, field in zip(self.pins, fields, strict=False):
                if field != b"f":
                    pins |= flag
            values = {
                name: None
                if field is None
                else bytes.fromhex(field.decode()).decode("utf-8", "surrogateescape")
                for name, field in zip(
                    self.settings, fields[len(self.pins) :], strict=True
                )
            }
        except ValueError as error:
            raise ProtocolViolation("not what was asked", by="server") from error
        return pins, values


def suspects(flags: int, held_by: int) -> int:
    """Which state there may be after statements with `flags`."""
    found = flags
    if flags & Flag.OPAQUE:
        found |= sum(PINS) | Flag.ANY_SETTING
    for flag, ended in ENDING.items():
        if flags & flag:
            found |= ended & held_by
    return found


def reset(flags: int) -> str | None:
    """The SQL that takes this state from a server; None for DISCARD ALL."""
    if flags & STATEMENTS:
        return None
    return ";".join(sql for flag, sql in RESETS if flags & flag)


def switch(have: Mapping[str, str], want: Mapping[str, str]) -> str:
    """Build the SQL that takes a server from one session's settings to another's.

    `set_config` reads a value as the start-up packet does, where SET would
    take a list for one name (manual 9.28.1).
    """
    # Who may set what depends on the role, so it is reset before all else and set
    # behind all else.
    if have == want:
        return ""
    resets = [f"RESET {quote_name(name)}" for name in ROLES if name in have]
    resets += [
        f"RESET {quote_name(name)}"
        for name in sorted(have)
        if name not in want and name not in ROLES
    ]
    changed = [
        name
        for name in sorted(want)
        if have.get(name) != want[name] and name not in ROLES
    ]
    changes = [
        f"pg_catalog.set_config({quote(name)}, {quote(want[name])}, false)"
        for name in [*changed, *(name for name in ROLES if name in want)]
    ]
    if changes:
        resets.append(f"SELECT {', '.join(changes)}")
    return ";".join(resets)


def restore(items: Mapping[str, str]) -> str:
    """Build the SQL that sets again what a RESET undid.

    To Postgres these settings are the session's own, so that it resets them to its
    defaults; where they came with the start-up packet it would go back to them. What
    the client has set since then keeps its value.
    """
    values = ", ".join(
        f"({quote(name)}, {quote(value)})" for name, value in items.items()
    )
    return (
        "SELECT pg_catalog.set_config(s.name, s.value, false) "
        f"FROM (VALUES {values}) AS s (name, value) WHERE coalesce("
        "(SELECT p.source <> 'session' FROM pg_catalog.pg_settings AS p "
        "WHERE pg_catalog.lower(p.name) = s.name), "
        "coalesce(pg_catalog.current_setting(s.name, true), '') = '')"
    )


def quote(text: str) -> str:
    """Quote a literal in ASCII.

    Safe whatever standard_conforming_strings and client_encoding say.
    """
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    if not escaped.isascii():
        escaped = "".join(map(_escape, escaped))
    return f"E'{escaped}'"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 128:
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that wasn't UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote_name(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'
