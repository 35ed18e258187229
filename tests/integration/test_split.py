"""The same bytes, cut otherwise on their way: the same answer.

Every script of `fixtures.scripts` is sent as a whole, then cut in two at each
place, then byte by byte; and what Postgres answers is cut on its way to the
proxy. The reference is the answer to the whole in the same mode, which
`test_differential` compares with Postgres's own.

Runs of a script share a connection, as `DISCARD ALL` leaves nothing of it, and
several lanes, each a database of its own, go in step: while one part is sent on
all lanes the proxy reads the part before.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from types import ModuleType

import psycopg
import pytest
from psycopg import sql

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.differences import (
    Extent,
    difference,
    masked,
    may_be_sent_at_once,
)
from tests.fixtures.engine import MODES, Organization, Proxy
from tests.fixtures.scripts import (
    FAMILIES,
    SCHEMA,
    SCRIPTS,
    Script,
    failures,
    values,
)
from tests.fixtures.wire import Message, Wire, message, query

LANES = 8

#: How often a script is cut: cuts, times the work of its bytes and messages.
MAX_WORK = 3_000_000

#: Bytes of a script that are sent each on its own.
EACH_BYTE = 2048

#: Families of many scripts that are alike but for their values.
ALIKE = (values, failures)

#: Seconds in which the proxy reads what all lanes have sent. Where it takes longer
#: it reads two parts at once, which is no less allowed.
PAUSE = 0.0003

END = query("SELECT 'the last'")
LAST = b"the last" + message(b"C", b"SELECT 1\0") + message(b"Z", b"I")
CLEAN = query("DISCARD ALL")

#: In transaction mode it ends with the loan of the server, and that with a cut or not.
SESSION_STATE = re.compile(
    rb"SET |set_config|sets_behind|PREPARE|TEMP|LISTEN|advisory|HOLD|nextval|shifting"
)

#: Scripts after which the proxy expects an answer too many; see the last test.
MISCOUNTED = (
    "copy in, extended, with an early sync",
    "copy in, extended, with an early sync, bad row",
    "copy in, flush and sync amid data",
)

#: What a lane sends: a script, in parts.
Parts = tuple[Script, list[bytes]]


class Lane:
    """One client, connected when it is first needed."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._wire: Wire | None = None

    def send(self, part: bytes) -> None:
        if self._wire is None:
            self._wire = Wire(self._dsn, timeout=20.0)
        self._wire.send(part)

    def hear(self, script: Script) -> bytes:
        """Receive up to the answer of END, or to the end of the stream."""
        assert self._wire is not None
        heard = bytearray()
        while not heard.endswith(LAST):
            part = self._wire.sock.recv(1 << 20)
            if not part:
                assert script[-1].is_last, bytes(heard[-500:])
                self.close()
                break
            heard += part
        return bytes(heard)

    def close(self) -> None:
        if self._wire is not None:
            self._wire.sock.close()
            self._wire = None


class Lanes:
    """Clients of one mode, in databases that are alike."""

    def __init__(self, dsns: Sequence[str]) -> None:
        self._lanes = [Lane(dsn) for dsn in dsns]

    def run(self, all_parts: Sequence[Parts]) -> list[list[Message]]:
        """Send scripts in parts, as many at once as there are lanes."""
        answers = []
        try:
            for start in range(0, len(all_parts), len(self._lanes)):
                answers += self._run(all_parts[start : start + len(self._lanes)])
        except BaseException:
            self.close()  # the next script begins afresh
            raise
        return answers

    def _run(self, all_parts: Sequence[Parts]) -> list[list[Message]]:
        lanes = list(zip(self._lanes, all_parts, strict=False))
        for number in range(max(len(parts) for _, parts in all_parts)):
            for lane, (_, parts) in lanes:
                if number < len(parts):
                    lane.send(parts[number])
            if number == 0 or len(lanes) < LANES:
                time.sleep(PAUSE)
        for lane, (script, _) in lanes:
            if not script[-1].is_last:
                lane.send(CLEAN + END)
        return [split(lane.hear(script)) for lane, (script, _) in lanes]

    def references(self, scripts: Sequence[Script]) -> list[list[list[Message]]]:
        """What each lane is told when a script comes as a whole.

        Asked twice, as it must be the same again: else the script leaves something
        behind that DISCARD ALL does not take, and cuts could not be compared.
        """
        found = []
        for script in scripts:
            sent = [(script, [whole(script)])] * len(self._lanes)
            self.run(sent)
            found.append(self.run(sent))
            assert self.run(sent) == found[-1]
        return found

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()


def whole(script: Script) -> bytes:
    return b"".join(step.data for step in script)


def split(stream: bytes) -> list[Message]:
    """The messages of a stream, masked."""
    found, place = [], 0
    while place < len(stream):
        size = int.from_bytes(stream[place + 1 : place + 5], "big")
        found.append(Message(chr(stream[place]), stream[place + 5 : place + 1 + size]))
        place += 1 + size
    return masked(found)


def places(name: str, data: bytes, share: float) -> list[int]:
    """Where to cut: everywhere, or for a share of the places or a long script by
    chance, the heads of messages first.
    """
    chance = random.Random(name)
    heads, place = [], 0
    while place < len(data):
        heads.append(place)
        place += 1 + int.from_bytes(data[place + 1 : place + 5], "big")
    most = int(max(MAX_WORK / (len(data) + 100 * len(heads)), 40) * share)
    if len(data) <= most:
        return list(range(1, len(data)))
    near = [head + step for head in heads for step in range(1, 6)]
    chosen = set(chance.sample(near, min(len(near), most // 2)))
    while len(chosen) < most:
        chosen.add(chance.randrange(1, len(data)))
    return sorted(place for place in chosen if place < len(data))


def bytewise(data: bytes) -> list[bytes]:
    """Single bytes, where there are many followed by parts of random sizes."""
    parts = [data[place : place + 1] for place in range(min(len(data), EACH_BYTE))]
    chance = random.Random(len(data))
    place = len(parts)
    while place < len(data):
        size = chance.randint(1, max(len(data) // 50, 1000))
        parts.append(data[place : place + size])
        place += size
    return parts


def names_in(family: ModuleType, mode: PoolMode) -> list[str]:
    """The scripts of a family whose answer does not hang on when they are read."""
    return [name for name in family.SCRIPTS if is_certain(name, mode)]


def is_certain(name: str, mode: PoolMode) -> bool:
    if name in MISCOUNTED:
        return False
    known = difference(name, mode)
    if known is not None and known.extent is not Extent.SOURCE:
        return False
    if mode is PoolMode.TRANSACTION and SESSION_STATE.search(whole(SCRIPTS[name])):
        return False
    return may_be_sent_at_once(name, mode)


@pytest.fixture(scope="module")
def organizations(proxy: Proxy) -> list[Organization]:
    return [prepared(proxy) for _ in range(LANES)]


def prepared(proxy: Proxy) -> Organization:
    """An organisation whose database has what the scripts need."""
    organization = proxy.create_organization(limiter=LimiterMode.OFF)
    with psycopg.connect(organization.direct_dsn, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        role = connection.info.user
    proxy.postgres.execute(
        sql.SQL("GRANT pg_monitor TO {}").format(sql.Identifier(role))
    )
    return organization


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> PoolMode:
    chosen: PoolMode = request.param
    return chosen


@pytest.fixture(scope="module")
def lanes(organizations: list[Organization], mode: PoolMode) -> Iterator[Lanes]:
    made = Lanes([each.dsn(str(mode)) for each in organizations])
    yield made
    made.close()


@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: family.__name__.rsplit(".")[-1]
)
def test_a_script_cut_in_two_anywhere_is_answered_the_same(
    lanes: Lanes, mode: PoolMode, family: ModuleType
) -> None:
    share = 1.0 if mode is PoolMode.AUTO and family not in ALIKE else 0.2
    for name in names_in(family, mode):
        script = SCRIPTS[name]
        data = whole(script)
        expected = lanes.references([script])[0]
        cuts = places(name, data, share)
        answers = lanes.run([(script, [data[:cut], data[cut:]]) for cut in cuts])
        for number, (cut, answer) in enumerate(zip(cuts, answers, strict=True)):
            assert answer == expected[number % LANES], f"{name}, cut at {cut}"


@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: family.__name__.rsplit(".")[-1]
)
def test_a_script_sent_byte_by_byte_is_answered_the_same(
    lanes: Lanes, mode: PoolMode, family: ModuleType
) -> None:
    names = names_in(family, mode)
    expected = lanes.references([SCRIPTS[name] for name in names])
    answers = lanes.run([(SCRIPTS[n], bytewise(whole(SCRIPTS[n]))) for n in names])
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert answer == expected[number][number % LANES], name


@pytest.mark.xfail(strict=True, reason="it goes on to wait for the first Sync's answer")
def test_a_sync_that_comes_amid_copy_is_not_waited_for(lanes: Lanes) -> None:
    """Postgres ignores it there (manual 55.2.6)."""
    name = MISCOUNTED[0]
    lanes.references([SCRIPTS[name]])
