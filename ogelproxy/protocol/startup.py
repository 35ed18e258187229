"""The first packet of a client: what it wants, and who it says it is.

Sizes and forms are the manual's 55.2.1 and 55.7; behind its length word a packet has
at most 10,000 bytes as in Postgres (MAX_STARTUP_PACKET_LENGTH).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ogelproxy.errors import NotSupported, ProtocolViolation
from ogelproxy.protocol.messages import CANCEL_REQUEST, LATEST_MINOR

MAX_STARTUP_BYTES = 4 + 10_000
MAX_CANCEL_BYTES = 12 + 256  # 55.2.1: keys are 4 to 256 bytes long
SSL_REQUEST = 80877103
GSSENC_REQUEST = 80877104

#: Parameters that say who and where; all others are session settings.
IDENTITY = frozenset({"user", "database", "options", "replication"})

#: Prefix of settings that are for the proxy, not for the database.
OURS = "ogel."

#: Packets that are remembered, and the largest of them in bytes: programs that
#: connect for each query send the same again and again.
REMEMBERED = 1024
MAX_REMEMBERED_BYTES = 512

BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """SSLRequest or GSSENCRequest."""

    is_tls: bool


@dataclass(frozen=True, slots=True)
class CancelRequest:
    process_id: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Startup:
    """A StartupMessage.

    `minor` is the version asked for, which may be newer than any there is;
    `settings` holds the session settings asked for, by parameter and by
    `options`, names in lower case; `session` those that are for the database, sorted;
    `unknown_options` the `_pq_.` names, as often and in the order in which they came.
    `replication` is empty, `true` for physical
    replication, or `database` for logical.
    """

    minor: int
    user: str
    database: str
    settings: Mapping[str, str]
    session: tuple[tuple[str, str], ...]
    unknown_options: tuple[str, ...]
    replication: str

    @property
    def spoken_minor(self) -> int:
        """The minor version that is spoken with this client."""
        return min(self.minor, LATEST_MINOR)

    @property
    def needs_negotiation(self) -> bool:
        """Whether the client has to be told what is not known here."""
        return self.minor > LATEST_MINOR or bool(self.unknown_options)


def packet_size(head: bytes) -> int:
    """Check the length word of a first packet; return the packet's size."""
    size: int = struct.unpack(">I", head[:4])[0]
    if not 8 <= size <= MAX_STARTUP_BYTES:
        raise ProtocolViolation("invalid length of startup packet")
    return size


def parse(packet: bytes) -> EncryptionRequest | CancelRequest | Startup:
    """Read a whole first packet. Raises ProtocolViolation, NotSupported."""
    version = struct.unpack_from(">I", packet, 4)[0]
    if version in (SSL_REQUEST, GSSENC_REQUEST):
        if len(packet) != 8:
            raise ProtocolViolation("invalid length of encryption request")
        return EncryptionRequest(is_tls=version == SSL_REQUEST)
    if version == CANCEL_REQUEST:
        if not 16 <= len(packet) <= MAX_CANCEL_BYTES:
            raise ProtocolViolation("invalid length of cancel request")
        return CancelRequest(struct.unpack_from(">I", packet, 8)[0], packet[12:])
    major, minor = version >> 16, version & 0xFFFF
    if major != 3:
        raise NotSupported(
            f"frontend protocol {major}.{minor}",
            hint=f"the proxy speaks 3.0 to 3.{LATEST_MINOR}",
        )
    body = packet[8:]
    if len(body) > MAX_REMEMBERED_BYTES:
        return _parse_parameters(body, minor)
    return _remembered(body, minor)


def _parse_parameters(body: bytes, minor: int) -> Startup:
    if body[-2:] != b"\0\0" and body != b"\0":
        raise ProtocolViolation("startup packet is not terminated")
    words = [word.decode("utf-8", "surrogateescape") for word in body[:-2].split(b"\0")]
    if len(words) % 2:
        raise ProtocolViolation("startup packet has a parameter without a value")
    given = dict(zip(words[::2], words[1::2], strict=True))
    user = given.get("user", "")
    if not user:
        raise ProtocolViolation("no user name in the startup packet")
    # A parameter wins over the same setting in `options`, as in Postgres
    # (process_startup_options).
    settings = parse_options(given.get("options", "")) | {
        name.lower(): value
        for name, value in given.items()
        if name not in IDENTITY and not name.startswith("_pq_.")
    }
    return Startup(
        minor=minor,
        user=user,
        database=given.get("database") or user,
        settings=settings,
        session=tuple(
            sorted(item for item in settings.items() if not item[0].startswith(OURS))
        ),
        unknown_options=tuple(name for name in words[::2] if name.startswith("_pq_.")),
        replication=_parse_replication(given.get("replication", "false")),
    )


_remembered = lru_cache(REMEMBERED)(_parse_parameters)


def _parse_replication(value: str) -> str:
    """Read the parameter as Postgres does (manual 55.7, parse_bool)."""
    if value == "database":
        return value
    # Words may be cut short where that leaves no doubt.
    word = value.lower()
    meant = {
        is_on for name, is_on in BOOLEANS.items() if word and name.startswith(word)
    }
    if len(meant) == 1:
        return "true" if meant.pop() else ""
    raise ProtocolViolation(f'invalid value for parameter "replication": "{value}"')


def parse_options(options: str) -> dict[str, str]:
    """Read `-c name=value` and `--name=value`, split as pg_split_opts does.

    A backslash makes the next character part of the word. Other server
    arguments are refused: they can't be carried from server to server.
    """
    settings: dict[str, str] = {}
    words = iter(split_options(options))
    for word in words:
        if word == "-c":
            pair = next(words, "")
        elif word.startswith("-c"):
            pair = word[2:]
        elif word.startswith("--"):
            pair = word[2:]
        else:
            raise ProtocolViolation(f"startup option {word!r} is not supported")
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ProtocolViolation(f"startup option {word!r} needs name=value")
        settings[name.replace("-", "_").lower()] = value
    return settings


def split_options(options: str) -> list[str]:
    """Split at white space, a backslash escaping the character behind it."""
    words: list[str] = []
    word: list[str] | None = None
    letters = iter(options)
    for letter in letters:
        if letter.isspace():
            if word is not None:
                words.append("".join(word))
            word = None
            continue
        word = [] if word is None else word
        word.append(next(letters, "") if letter == "\\" else letter)
    if word is not None:
        words.append("".join(word))
    return words
