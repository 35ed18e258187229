"""Rows of the proxy's own: columns and Python values as messages (manual 55.7).

For what is answered without a Postgres. Values go out as text or in binary, as the
client asked for each column.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ogelproxy.protocol.messages import message

Value = bool | int | float | str | datetime | None

TEXT_FORMAT, BINARY_FORMAT = 0, 1
#: What a binary timestamptz counts microseconds from (manual 8.5).
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
#: Base of a binary numeric's digits.
NBASE = 10_000


class Type(enum.IntEnum):
    """Types of columns by their OIDs (src/include/catalog/pg_type.dat)."""

    BOOL = 16
    INT8 = 20
    INT4 = 23
    TEXT = 25
    FLOAT8 = 701
    TIMESTAMPTZ = 1184
    NUMERIC = 1700  # here of whole numbers only


SIZES = {Type.BOOL: 1, Type.INT8: 8, Type.INT4: 4, Type.FLOAT8: 8, Type.TIMESTAMPTZ: 8}


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: Type = Type.TEXT


def row_description(columns: Sequence[Column], formats: Sequence[int]) -> bytes:
    """Build a RowDescription; `formats` has a code for each column."""
    parts = [struct.pack(">h", len(columns))]
    for column, code in zip(columns, formats, strict=True):
        parts.append(column.name.encode() + b"\0")
        size = SIZES.get(column.type, -1)
        parts.append(struct.pack(">ihihih", 0, 0, column.type, size, -1, code))
    return message(b"T", b"".join(parts))


def data_row(
    columns: Sequence[Column], values: Sequence[Value], formats: Sequence[int]
) -> bytes:
    """Build a DataRow; each value must fit its column's type."""
    parts = [struct.pack(">h", len(columns))]
    for column, value, code in zip(columns, values, formats, strict=True):
        if value is None:
            parts.append(b"\xff\xff\xff\xff")
            continue
        data = binary(column.type, value) if code == BINARY_FORMAT else text(value)
        parts.append(struct.pack(">i", len(data)) + data)
    return message(b"D", b"".join(parts))


def text(value: bool | int | float | str | datetime) -> bytes:
    match value:
        case bool():
            return b"t" if value else b"f"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00".encode()
        case str():
            return value.replace("\0", "").encode("utf-8", "replace")
    return str(value).encode()


def binary(type: Type, value: bool | int | float | str | datetime) -> bytes:
    match type, value:
        case Type.BOOL, bool():
            return struct.pack(">?", value)
        case Type.INT4, int():
            return struct.pack(">i", value)
        case Type.INT8, int():
            return struct.pack(">q", value)
        case Type.FLOAT8, int() | float():
            return struct.pack(">d", value)
        case Type.NUMERIC, int():
            return _numeric(value)
        case Type.TIMESTAMPTZ, datetime():
            since = value - EPOCH
            seconds = since.days * 86_400 + since.seconds
            return struct.pack(">q", seconds * 1_000_000 + since.microseconds)
        case Type.TEXT, str():
            return text(value)
    raise TypeError(f"{value!r} is no {type.name}")


def _numeric(value: int) -> bytes:
    """A whole number as Postgres sends numerics (src/backend/utils/adt/numeric.c)."""
    digits = []
    rest = abs(value)
    while rest:
        rest, digit = divmod(rest, NBASE)
        digits.append(digit)
    digits.reverse()
    sign = 0x4000 if value < 0 else 0
    head = struct.pack(">hhHh", len(digits), max(len(digits) - 1, 0), sign, 0)
    return head + struct.pack(f">{len(digits)}h", *digits)
