"""Read the few statements of SQL that change what a session is like.

The compiled scan says that a text holds a SET, a set_config() or a PREPARE; here
is read which setting or statement it names. Names only: what became of a setting
is asked of the server, which knows. The lexer follows Postgres's
(src/backend/parser/scan.l) with standard_conforming_strings on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

#: Longest text that is read; of a longer one it isn't known what it names.
MAX_TEXT = 65_536

#: Stands for every setting: RESET ALL, DISCARD ALL.
ALL = "*"

TOKEN = re.compile(
    r"""
    (?P<space>\s+|--[^\r\n]*)
    |(?P<comment>/\*)
    |(?P<string>(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*')
    |(?P<escaped>[eE]'(?:[^'\\]|\\.|'')*')
    |(?P<dollar>\$(?P<tag>(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)?)\$
        .*?\$(?P=tag)\$)
    |(?P<quoted>(?:[uU]&)?"(?:[^"]|"")+")
    |(?P<name>[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*)
    |(?P<other>\$?[0-9]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)

#: What a SET that is a RESET has in it (manual, SET).
DEFAULT = re.compile(rb"\b(?:default|local)\b", re.IGNORECASE)

#: SET's own spellings of settings (manual, SET).
SPELLED = {
    "names": "client_encoding",
    "schema": "search_path",
    "time": "timezone",
    "xml": "xmloption",
    "role": "role",
}
#: They belong to one transaction, however they are set.
TRANSIENT = {
    "",
    "transaction_isolation",
    "transaction_read_only",
    "transaction_deferrable",
}
CHARACTERISTICS = (
    "default_transaction_isolation",
    "default_transaction_read_only",
    "default_transaction_deferrable",
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token; `start` and `end` are byte offsets into the text."""

    kind: str  # string, escaped, dollar, quoted, name or other
    text: str  # as it stands there, each byte one character
    start: int
    end: int

    @property
    def word(self) -> str:
        """A name without quotes in lower case, or a mark; empty for the rest."""
        return self.text.lower() if self.kind in ("name", "other") else ""


@dataclass(frozen=True, slots=True)
class Named:
    """A statement that names a prepared one; places are byte offsets."""

    verb: str  # prepare, execute or deallocate
    name: bytes  # of the prepared statement, as Postgres folds it
    index: int  # which statement of the query, from 0
    begin: int  # the statement
    stop: int
    start: int  # the name in it
    end: int

    def replaced(self, text: bytes, other: bytes) -> Replaced:
        """What it means for errors when `other` stands for the name in `text`."""
        old = text[self.start : self.end].decode("utf-8", "replace")
        before = text[: self.start].decode("utf-8", "replace")
        return Replaced(len(before) + 1, len(other) - len(old), other, self.name)


class Replaced(NamedTuple):
    """A name in a query that was replaced on its way."""

    position: int  # in characters counted from 1 (manual 55.8, P)
    growth: int  # characters
    server_name: bytes
    name: bytes


def tokens(text: bytes) -> Iterator[Token]:
    """Yield the tokens of `text` without comments and white space.

    What is not SQL, such as an open quote, comes as tokens of one character.
    """
    source = text.decode("latin-1")
    at = 0
    while at < len(source):
        match = TOKEN.match(source, at)
        assert match is not None and match.lastgroup is not None
        kind = match.lastgroup if match.lastgroup != "tag" else "dollar"
        if kind == "comment":
            at = _behind_comment(source, at)
            continue
        if kind != "space":
            yield Token(kind, match[0], at, match.end())
        at = match.end()


def _behind_comment(source: str, at: int) -> int:
    """Where the block comment that begins at `at` ends; comments nest."""
    depth = 0
    for mark in re.compile(r"/\*|\*/").finditer(source, at):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(source)


def settings_changed(text: bytes) -> frozenset[str] | None:
    """Name the settings that `text` may change for the session, in lower case.

    ALL stands for every one. None when it can't be known: a name that is computed,
    or too long a text. A name too many does no harm.
    """
    if len(text) > MAX_TEXT:
        return None
    found = list(tokens(text))
    names: set[str | None] = set()
    at_start = True
    for index, token in enumerate(found):
        word = token.word
        if at_start and word in ("set", "reset", "discard"):
            names.update(_set_names(word, found[index + 1 : index + 5]))
        elif token.text.lower().strip('"') == "set_config":
            names.add(_set_config_name(found[index + 1 :]))
        elif token.text.lower().strip('"') == "pg_settings" and any(
            each.word == "update" for each in found[:index]
        ):
            return None
        at_start = word == ";"
    known = frozenset(name for name in names if name is not None)
    # Which letters those that aren't ASCII are hangs on the client's encoding.
    if None in names or "seed" in known or not all(map(str.isascii, known)):
        return None
    return known - TRANSIENT


def _set_names(verb: str, rest: list[Token]) -> Iterator[str | None]:
    """Yield what a SET, RESET or DISCARD names; nothing for a local one."""
    words = [token.word for token in rest] + [""] * 4
    if verb == "discard":
        if words[0] == "all":
            yield ALL
        return
    if words[0] == "session" and words[1] == "characteristics":
        yield from CHARACTERISTICS
        return
    if words[0] == "session" and words[1] == "authorization":
        # It resets the role as well.
        yield from ("session_authorization", "role")
        return
    if words[0] == "session" and words[1] not in ("", ".", "=", "to"):
        rest, words = rest[1:], words[1:]
    if words[0] == "local" and words[1] not in (".", "=", "to"):
        return
    if words[0] in ("transaction", "constraints") and words[1] not in ("=", "to", "."):
        return
    if verb == "reset" and words[0] == "all":
        yield ALL
        return
    if words[0] in SPELLED and words[1] not in ("=", "to", "."):
        yield SPELLED[words[0]]
        return
    yield _dotted(rest)


def _dotted(rest: list[Token]) -> str | None:
    """Read a setting's name, such as work_mem or "my".setting; None with escapes."""
    parts = []
    for index, token in enumerate(rest):
        if token.text[:2].lower() == "u&":
            return None
        if index % 2 == 0 and token.kind in ("name", "quoted"):
            parts.append(identifier(token).decode("utf-8", "replace").lower())
        elif index % 2 == 0 or token.text != ".":
            break
    return ".".join(parts)


def _set_config_name(rest: list[Token]) -> str | None:
    """Read the name in set_config's arguments: '' if it is local, None if unknown."""
    arguments: list[list[Token]] = [[]]
    depth = 0
    for token in rest:
        if token.text in ("(", "["):
            depth += 1
            if depth == 1:
                continue
        elif token.text in (")", "]"):
            depth -= 1
        if depth <= 0:
            break
        if token.text == "," and depth == 1:
            arguments.append([])
        else:
            arguments[-1].append(token)
    if len(arguments) != 3:
        return "" if depth == 0 and not arguments[0] else None
    if [token.word for token in arguments[2]] == ["true"]:
        return ""
    name = arguments[0]
    if name and name[0].kind == "string" and name[0].text.startswith("'"):
        # What may follow is a cast: 'work_mem'::text.
        cast = [token.text for token in name[1:3]] + [token.kind for token in name[3:]]
        if not cast or cast == [":", ":", "name"]:
            return name[0].text[1:-1].replace("''", "'").lower()
    return None


def named_statements(text: bytes) -> list[Named]:
    """Find which prepared statements a query makes, runs or drops, in their order.

    Statements that name none, such as DEALLOCATE ALL, are not in it. Empty also when
    the query can't be read.
    """
    if len(text) > MAX_TEXT:
        return []
    found: list[Named] = []
    for index, statement in enumerate(_split(tokens(text))):
        verb, token = _name_in(statement)
        if token is None:
            continue
        if token.text[:2].lower() == "u&":
            return []
        begin, stop = statement[0].start, statement[-1].end
        found.append(
            Named(verb, identifier(token), index, begin, stop, token.start, token.end)
        )
    return found


def _split(found: Iterator[Token]) -> Iterator[list[Token]]:
    """Yield the statements of a query that are not empty."""
    statement: list[Token] = []
    depth = 0
    for token in found:
        depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
        if token.text != ";" or depth > 0:
            statement.append(token)
        elif statement:
            yield statement
            statement = []
    if statement:
        yield statement


def _name_in(statement: list[Token]) -> tuple[str, Token | None]:
    """What a statement does to which prepared one."""
    verb, rest = statement[0].word, statement[1:]
    if verb in ("explain", "create"):
        words = [token.word for token in rest]
        at = words.index("execute") if "execute" in words else len(words)
        verb, rest = "execute", rest[at + 1 :]
    elif verb == "deallocate":
        if len(rest) > 1 and rest[0].word == "prepare":
            rest = rest[1:]
        if rest and rest[0].word == "all":
            return verb, None
    elif verb == "prepare" and len(rest) > 1 and rest[0].word == "transaction":
        # A statement may be named transaction; a literal tells them apart.
        if rest[1].kind in ("string", "escaped", "dollar"):
            return verb, None
    elif verb not in ("prepare", "execute"):
        return verb, None
    if rest and rest[0].kind in ("name", "quoted"):
        return verb, rest[0]
    return verb, None


def identifier(token: Token) -> bytes:
    """Fold a name as Postgres does (manual 4.1.1); at most 63 bytes of it count."""
    if token.kind == "quoted":
        name = token.text[1:-1].replace('""', '"')
    else:
        # ASCII only, as with any multi-byte encoding of the server.
        name = re.sub("[A-Z]", lambda letter: letter[0].lower(), token.text)
    return _truncate(name.encode("latin-1"))


def _truncate(name: bytes) -> bytes:
    if len(name) <= 63:
        return name
    return name[:63].decode("utf-8", "ignore").encode() or name[:63]
