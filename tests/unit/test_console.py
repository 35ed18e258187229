"""The console's grammar and portals, without a proxy."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.console.portals import MAX_NAMES, Portals, Refused, Result, complete
from ogelproxy.console.statements import Command, split
from ogelproxy.console.tenant import STATEMENT
from ogelproxy.protocol.rows import Column, Type


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("SHOW pools", [Command("SHOW", ("pools",))]),
        (" show\n\tPOOLS ; ", [Command("SHOW", ("POOLS",))]),
        ('pause "org_a/my ""app"""', [Command("PAUSE", ('org_a/my "app"',))]),
        ("PAUSE org_a/app", [Command("PAUSE", ("org_a/app",))]),
        ("/* a; */ KILL -- all\n;;", [Command("KILL")]),
        ("set a='it''s'", [Command("SET", ("a", "=", "it's"))]),
        ("a;b", [Command("A"), Command("B")]),
        ('"a;b"', [Command("A;B")]),
        ("", []),
        (" ; -- x", []),
    ],
)
def test_a_text_is_cut_into_its_commands(text: str, commands: list[Command]) -> None:
    assert split(text) == commands


@pytest.mark.parametrize("text", ['"open', "'open", "SHOW 'a", '"a""'])
def test_an_open_quotation_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="unterminated"):
        split(text)


@given(st.text(alphabet="aA \"'/*-;=\n\0é"))
def test_any_text_is_cut_or_refused(text: str) -> None:
    try:
        commands = split(text)
    except Refused:
        return
    assert len(commands) <= text.count(";") + 1


def test_a_hostile_text_takes_no_time() -> None:
    # With backtracking either would take longer than there is.
    text = "/* a */" * 20_000 + "x"
    assert STATEMENT.match(b"SHOW o7s.help" + text.encode()) is None
    assert split(text) == [Command("X")]


@dataclass
class Numbers:
    columns: tuple[Column, ...] | None = (Column("n", Type.INT4), Column("t"))


def bind(*formats: int, name: bytes = b"", parameters: int = 0) -> bytes:
    counts = struct.pack(">hh", 0, parameters)
    codes = struct.pack(f">h{len(formats)}h", len(formats), *formats)
    return b"\0" + name + b"\0" + counts + codes


@pytest.mark.parametrize(
    ("formats", "expected"),
    [((), [0, 0]), ((1,), [1, 1]), ((0, 1), [0, 1])],
)
def test_formats_are_one_for_all_or_one_each(
    formats: tuple[int, ...], expected: list[int]
) -> None:
    portals = Portals[Numbers]()
    portals.parse(b"", Numbers())
    portals.bind(bind(*formats))
    portal, _ = portals.execute(b"\0\0\0\0\0")
    assert list(portal.formats) == expected


@pytest.mark.parametrize(
    "body", [bind(0, 0, 0), bind(7), bind(parameters=1), b"\0\0", b"\0\0\0\1"]
)
def test_a_bind_that_does_not_fit_is_refused(body: bytes) -> None:
    portals = Portals[Numbers]()
    portals.parse(b"", Numbers())
    with pytest.raises(Refused) as caught:
        portals.bind(body)
    assert b"C08P01\0" in caught.value.message


@given(st.binary(max_size=40))
def test_any_bind_is_taken_or_refused(body: bytes) -> None:
    portals = Portals[Numbers]()
    portals.parse(b"", Numbers())
    try:
        portals.bind(b"\0\0" + body)
    except Refused:
        assert not portals.has_portal(b"")


def test_rows_come_in_portions() -> None:
    portals = Portals[Numbers]()
    portals.parse(b"n", Numbers())
    portals.bind(bind(name=b"n"))
    portal, limit = portals.execute(b"\0\0\0\0\2")
    result = Result(iter([(1, "a"), (2, "b"), (3, None)]), "SHOW")
    first, rest = portal.fetch(result, limit), portal.fetch(result, 0)
    assert first.endswith(b"s\0\0\0\4")
    assert rest.endswith(complete("SHOW"))
    assert rest.count(b"D\0\0\0") == 1


def test_names_are_bounded_and_a_named_statement_is_not_replaced() -> None:
    portals = Portals[Numbers]()
    for number in range(MAX_NAMES):
        portals.parse(b"%d" % number, Numbers())
    with pytest.raises(Refused, match="too many"):
        portals.parse(b"one more", Numbers())
    with pytest.raises(Refused, match="already exists"):
        portals.parse(b"1", Numbers())
    portals.close(b"S1\0")
    portals.parse(b"1", Numbers())
    portals.clear()
    assert len(portals) == 0
