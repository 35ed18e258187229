"""The same bytes to Postgres and through the proxy: the same answer, byte by byte.

Each script of `fixtures.scripts` runs on a connection of its own and ends with
one more query and the end of the stream, so that an answer too many or too few
is seen. What is allowed to differ is in DIFFERENCES, with its reason, and must
really differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import MODES, Organization, Proxy
from tests.fixtures.scripts import SCHEMA, SCRIPTS, Script
from tests.fixtures.wire import TERMINATE, Message, Wire, query

END = query("SELECT 'the last'")
SHARED = (PoolMode.TRANSACTION, PoolMode.AUTO)

#: Short scripts that are also sent cut in two at every place.
CUT = (
    "simple errors pipelined",
    "named in one batch",
    "unknown amid a batch",
    "query after a failed message",
    "copy in, failed by the client",
)


class Difference(NamedTuple):
    """Why a script is answered differently in some modes."""

    modes: tuple[PoolMode, ...]
    reason: str
    #: Equal but for the source file, line and routine of errors.
    is_source_only: bool = False
    #: The state is lost between two steps, if the client waits between them.
    is_lost_in_waits: bool = False


OWN_ERROR = Difference(
    SHARED,
    "the proxy knows the names of statements, and answers without asking Postgres",
    is_source_only=True,
)
RENAMED = Difference(
    SHARED, "the protocol's statements have other names on the server, unknown to SQL"
)
DIFFERENCES: dict[str, Difference] = {
    "unnamed lost to a simple query": OWN_ERROR,
    "unnamed lost to a failed parse": OWN_ERROR,
    "unnamed closed": OWN_ERROR,
    "named twice": OWN_ERROR,
    "same text under two names": OWN_ERROR,
    "error before a named parse": OWN_ERROR,
    "deallocate": OWN_ERROR,
    "bind to unknown": OWN_ERROR,
    "describe unknown": OWN_ERROR,
    "unknown amid a batch": OWN_ERROR,
    "unknown in a transaction": OWN_ERROR,
    "error, pipelined, before a statement of another batch": OWN_ERROR,
    "error before the unnamed": OWN_ERROR,
    "deallocate by name": RENAMED,
    "execute in SQL": RENAMED,
    "set then show": Difference(
        (PoolMode.TRANSACTION,),
        "a setting ends with the loan of its server",
        is_lost_in_waits=True,
    ),
    "prepared in SQL": Difference(
        (PoolMode.TRANSACTION,),
        "what SQL prepares ends with the loan of its server",
        is_lost_in_waits=True,
    ),
    "listen": Difference(
        (PoolMode.TRANSACTION,),
        "listening ends with the loan of its server",
        is_lost_in_waits=True,
    ),
    "temporary table": Difference(
        (PoolMode.TRANSACTION,),
        "temporary tables end with the loan of their server",
        is_lost_in_waits=True,
    ),
}


class Answers:
    """What Postgres itself answers to each script, asked once."""

    def __init__(self, organization: Organization) -> None:
        self.organization = organization
        self._known: dict[str, list[Message]] = {}

    def direct(self, name: str) -> list[Message]:
        if name not in self._known:
            with Wire(self.organization.direct_dsn) as wire:
                self._known[name] = by_steps(wire, SCRIPTS[name]) + finish(wire)
        return self._known[name]

    def wire(self, mode: PoolMode) -> Wire:
        return Wire(self.organization.dsn(str(mode)), timeout=5.0)


@pytest.fixture(scope="module")
def answers(proxy: Proxy) -> Iterator[Answers]:
    organization = proxy.create_organization(limiter=LimiterMode.OFF)
    with psycopg.connect(organization.direct_dsn, autocommit=True) as connection:
        connection.execute(SCHEMA)
    yield Answers(organization)


def finish(wire: Wire) -> list[Message]:
    """Ask once more, say goodbye, and collect all that is left."""
    wire.send(END)
    return up_to_end(wire)


def up_to_end(wire: Wire) -> list[Message]:
    """Collect up to the answer of END, say goodbye, and collect what is left."""
    got: list[Message] = []
    while not got or b"the last" not in got[-1].body:
        if got and got[-1].kind == "E" and got[-1].fields()["S"] == "FATAL":
            return got + wire.rest()
        got += [wire.receive()]
    got += wire.until("Z")
    wire.send(TERMINATE)
    return got + wire.rest()


def by_steps(wire: Wire, script: Script) -> list[Message]:
    got = []
    for step in script:
        wire.send(step.data)
        got += wire.until(step.until)
    return got


def masked(messages: list[Message]) -> list[Message]:
    """Without the process ids of notifications."""
    return [
        Message("A", b"\0\0\0\0" + each.body[4:]) if each.kind == "A" else each
        for each in messages
    ]


def without_source(messages: list[Message]) -> list[Message]:
    """Without the file, line and routine that errors come from."""
    return [
        Message(
            each.kind,
            b"\0".join(
                p for p in each.body.split(b"\0") if p[:1] not in b"FLR" or not p
            ),
        )
        if each.kind in "EN"
        else each
        for each in messages
    ]


def brief(messages: list[Message]) -> list[tuple[str, bytes]]:
    """Short enough to be read in a failure."""
    return [
        (each.kind, each.body)
        if len(each.body) < 500
        else (each.kind, each.body[:80] + b"... %d bytes" % len(each.body))
        for each in messages
    ]


def compare(
    name: str, mode: PoolMode, expected: list[Message], got: list[Message]
) -> None:
    expected, got = masked(expected), masked(got)
    difference = DIFFERENCES.get(name)
    if difference is None or mode not in difference.modes:
        assert brief(got) == brief(expected)
        assert got == expected
        return
    assert got != expected, f"no longer differs: {difference.reason}"
    if difference.is_source_only:
        assert brief(without_source(got)) == brief(without_source(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_answered_as_by_postgres(
    answers: Answers, name: str, mode: PoolMode
) -> None:
    expected = answers.direct(name)
    with answers.wire(mode) as wire:
        got = by_steps(wire, SCRIPTS[name]) + finish(wire)
    compare(name, mode, expected, got)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_sent_in_one_piece_is_answered_the_same(
    answers: Answers, name: str, mode: PoolMode
) -> None:
    difference = DIFFERENCES.get(name)
    if (
        difference is not None
        and difference.is_lost_in_waits
        and mode in difference.modes
    ):
        pytest.skip("may be lost or not: " + difference.reason)
    everything = b"".join(step.data for step in SCRIPTS[name]) + END
    with Wire(answers.organization.direct_dsn) as wire:
        wire.send(everything)
        expected = up_to_end(wire)
    with answers.wire(mode) as wire:
        wire.send(everything)
        got = up_to_end(wire)
    compare(name, mode, expected, got)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CUT)
def test_a_script_cut_anywhere_is_answered_the_same(
    answers: Answers, name: str, mode: PoolMode
) -> None:
    script = SCRIPTS[name]
    data = b"".join(step.data for step in script)
    until = "".join(step.until for step in script)
    with answers.wire(mode) as wire:
        wire.send(data)
        expected = wire.until(until)
        for cut in range(1, len(data)):
            wire.send(data[:cut])
            time.sleep(0.0005)  # so that the two parts are mostly read apart
            wire.send(data[cut:])
            assert wire.until(until) == expected, f"cut at {cut}"
        assert finish(wire)
    direct = answers.direct(name)
    compare(name, mode, direct[: len(expected)], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CUT)
def test_a_script_sent_byte_by_byte_is_answered_the_same(
    answers: Answers, name: str, mode: PoolMode
) -> None:
    expected = answers.direct(name)
    with answers.wire(mode) as wire:
        got: list[Message] = []
        for step in SCRIPTS[name]:
            for place in range(len(step.data)):
                wire.send(step.data[place : place + 1])
                time.sleep(0.0002)
            got += wire.until(step.until)
        got += finish(wire)
    compare(name, mode, expected, got)


@pytest.mark.parametrize("mode", MODES)
def test_a_client_is_told_the_same_settings_at_login(
    answers: Answers, mode: PoolMode
) -> None:
    settings = {
        "application_name": "told",
        "DateStyle": "German",
        "TimeZone": "Asia/Tokyo",
    }
    with Wire(answers.organization.direct_dsn, settings) as wire:
        expected = wire.statuses
    with Wire(answers.organization.dsn(str(mode)), settings) as wire:
        assert wire.statuses == expected
