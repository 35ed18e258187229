"""Statements of the operators' console: words, cut from a query's text.

The grammar is PgBouncer's: a verb, mostly one argument, names quoted where needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ogelproxy.console.portals import Refused

HINT = "use SHOW HELP"

#: Atomic, so that no text takes long to be refused.
TOKEN = re.compile(
    r"(?P<blank>(?>\s+|--[^\n]*|/\*.*?\*/))"
    r"|(?P<end>;)"
    r'|"(?P<name>(?>[^"]|"")*)"'
    r"|'(?P<text>(?>[^']|'')*)'"
    r"|(?P<word>(?>[^\s;\"'=]+))"
    r"|(?P<sign>=)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Command:
    """One statement: its first word in capitals, and the others as they are."""

    verb: str
    words: tuple[str, ...] = ()

    def subject(self) -> str:
        """Return the only word behind the verb, or an empty one. Raises Refused."""
        if len(self.words) > 1:
            raise unknown(self)
        return self.words[0] if self.words else ""


def split(text: str) -> list[Command]:
    """Cut a query into its statements. Raises Refused."""
    commands: list[Command] = []
    words: list[str] = []
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise Refused("42601", "unterminated quotation or comment", HINT)
        at = found.end()
        kind = found.lastgroup
        if kind == "end":
            commands += _command(words)
            words = []
        elif kind == "name":
            words.append(found["name"].replace('""', '"'))
        elif kind == "text":
            words.append(found["text"].replace("''", "'"))
        elif kind != "blank":
            words.append(found[0])
    return commands + _command(words)


def _command(words: list[str]) -> list[Command]:
    return [Command(words[0].upper(), tuple(words[1:]))] if words else []


def unknown(command: Command) -> Refused:
    """The refusal of a statement that is none of ours."""
    shown = " ".join((command.verb, *command.words))[:100]
    return Refused("42601", f"unknown command: {shown}", HINT)
