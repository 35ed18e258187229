"""Build and read the messages that are off the hot path.

Names and forms follow the Postgres manual, 55.7. The hot path's framing is
`_wire`; this module is for login, errors and the proxy's own queries.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from ogelproxy.errors import OgelError, ProtocolViolation

PROTOCOL_3 = 3 << 16
#: The newest minor version that is spoken here, to clients and to servers: 3.2,
#: which has longer cancel keys. There is no 3.1 (manual 55.1.3).
LATEST_MINOR = 2
CANCEL_REQUEST = 80877102

READY_IDLE = b"Z\0\0\0\x05I"
AUTHENTICATION_OK = b"R\0\0\0\x08\0\0\0\0"
TERMINATE = b"X\0\0\0\x04"


def message(kind: bytes, body: bytes) -> bytes:
    """Frame `body` as a message of type `kind`."""
    return kind + (len(body) + 4).to_bytes(4, "big") + body


def _fields(fields: Sequence[tuple[str, str]]) -> bytes:
    parts = [f"{tag}{_clean(text)}\0".encode() for tag, text in fields if text]
    return b"".join(parts) + b"\0"


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def error_response(error: OgelError, *, is_fatal: bool | None = None) -> bytes:
    """Turn an error of ours into an ErrorResponse (manual 55.8)."""
    fatal = error.is_fatal if is_fatal is None else is_fatal
    severity = "FATAL" if fatal else "ERROR"
    return message(b"E", _notice(error, severity))


def notice_response(error: OgelError) -> bytes:
    """Turn what would have been an error into a NoticeResponse."""
    return message(b"N", _notice(error, "NOTICE"))


def debug_response(text: str) -> bytes:
    """A NoticeResponse for those who set client_min_messages to a debug level."""
    return message(
        b"N", _fields([("S", "DEBUG"), ("V", "DEBUG"), ("C", "00000"), ("M", text)])
    )


def _notice(error: OgelError, severity: str) -> bytes:
    return _fields(
        [
            ("S", severity),
            ("V", severity),
            ("C", error.sqlstate),
            ("M", error.client_text),
            ("D", error.detail),
            ("H", error.hint),
        ]
    )


def plain_error(sqlstate: str, text: str, hint: str = "") -> bytes:
    """An ERROR worded as Postgres words it, for what the proxy answers itself."""
    severity = [("S", "ERROR"), ("V", "ERROR")]
    fields = [("C", sqlstate), ("M", text), ("H", hint)]
    return message(b"E", _fields(severity + fields))


def plain_notice(text: str) -> bytes:
    """A NOTICE without a condition of its own."""
    return message(
        b"N", _fields([("S", "NOTICE"), ("V", "NOTICE"), ("C", "00000"), ("M", text)])
    )


def authentication(body: bytes) -> bytes:
    return message(b"R", body)


def parameter_status(name: str, value: str) -> bytes:
    return message(b"S", f"{name}\0{value}\0".encode("utf-8", "surrogateescape"))


def backend_key_data(process_id: int, secret: bytes) -> bytes:
    return message(b"K", process_id.to_bytes(4, "big") + secret)


def negotiate_protocol_version(minor: int, options: Sequence[str]) -> bytes:
    """Say which protocol is spoken here and which options are not known.

    The manual calls the number a minor version; Postgres 18 sends, and libpq
    wants, the major one in its upper half (src/backend/tcop/backend_startup.c).
    """
    names = b"".join(
        option.encode("utf-8", "surrogateescape") + b"\0" for option in options
    )
    return message(b"v", struct.pack(">ii", PROTOCOL_3 + minor, len(options)) + names)


def query(sql: str) -> bytes:
    return message(b"Q", sql.encode("utf-8", "surrogateescape") + b"\0")


def startup(parameters: Mapping[str, str], *, minor: int = 0) -> bytes:
    """Build a StartupMessage of protocol 3.`minor`."""
    body = b"".join(
        f"{name}\0{value}\0".encode("utf-8", "surrogateescape")
        for name, value in parameters.items()
    )
    return struct.pack(">ii", len(body) + 9, PROTOCOL_3 + minor) + body + b"\0"


def cancel_request(process_id: int, secret: bytes) -> bytes:
    return struct.pack(">iiI", 12 + len(secret), CANCEL_REQUEST, process_id) + secret


def read_fields(body: bytes) -> dict[str, str]:
    """Read the fields of an ErrorResponse or NoticeResponse, by their letter."""
    fields = {}
    for part in body.split(b"\0"):
        if part:
            fields[chr(part[0])] = part[1:].decode("utf-8", "replace")
    return fields


def read_row(body: bytes) -> list[bytes | None]:
    """Read the fields of a DataRow."""
    fields: list[bytes | None] = []
    at = 2
    for _ in range(int.from_bytes(body[:2], "big")):
        size = int.from_bytes(body[at : at + 4], "big", signed=True)
        at += 4
        if size < 0:
            fields.append(None)
            continue
        fields.append(body[at : at + size])
        at += size
    if at != len(body):
        raise ProtocolViolation("malformed DataRow", by="server")
    return fields


def read_strings(body: bytes) -> list[str]:
    """Read the zero-terminated strings that make up `body`."""
    if not body.endswith(b"\0"):
        raise ProtocolViolation("string is not terminated")
    return [part.decode("utf-8", "surrogateescape") for part in body[:-1].split(b"\0")]
