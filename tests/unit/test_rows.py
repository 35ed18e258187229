"""Values as Postgres sends them: compared with what a Postgres driver reads."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.adapt import Transformer
from psycopg.pq import Format

from ogelproxy.protocol.rows import (
    Column,
    Type,
    Value,
    binary,
    data_row,
    row_description,
    text,
)

VALUES: list[tuple[Type, Value]] = [
    (Type.BOOL, True),
    (Type.BOOL, False),
    (Type.INT4, -(2**31)),
    (Type.INT8, 2**63 - 1),
    (Type.FLOAT8, 0.1),
    (Type.FLOAT8, 3),
    (Type.NUMERIC, 0),
    (Type.NUMERIC, -120_000_300),
    (Type.TEXT, 'ä "quoted"'),
    (Type.TIMESTAMPTZ, datetime(1999, 12, 31, 23, 59, 59, 1, UTC)),
    (Type.TIMESTAMPTZ, datetime(2026, 2, 3, tzinfo=timezone(timedelta(hours=2)))),
]


def read(type: Type, data: bytes, format: Format) -> object:
    return Transformer().get_loader(type, format).load(data)


@pytest.mark.parametrize(("type", "value"), VALUES)
def test_a_driver_reads_what_was_written(type: Type, value: Value) -> None:
    assert value is not None
    assert read(type, text(value), Format.TEXT) == value
    assert read(type, binary(type, value), Format.BINARY) == value


@given(st.integers(-(10**40), 10**40))
def test_a_driver_reads_every_whole_number_as_numeric(value: int) -> None:
    assert read(Type.NUMERIC, binary(Type.NUMERIC, value), Format.BINARY) == value


def test_a_value_of_another_type_is_a_defect() -> None:
    with pytest.raises(TypeError):
        binary(Type.INT4, "1")


def test_a_row_has_formats_and_nulls_by_column() -> None:
    columns = [Column("number", Type.INT4), Column("none"), Column("number", Type.INT4)]
    row = data_row(columns, [1, None, 1], [0, 0, 1])
    assert row == b"D" + struct.pack(
        ">ihi1sii4s", len(row) - 1, 3, 1, b"1", -1, 4, b"\0\0\0\1"
    )
    described = row_description(columns[:1], [1])
    assert described[7:] == b"number\0" + struct.pack(">ihihih", 0, 0, 23, 4, -1, 1)


def test_text_without_a_place_on_the_wire_is_cleaned() -> None:
    assert text("a\0b\ud800") == b"ab?"
