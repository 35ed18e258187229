"""The same bytes, cut otherwise on their way: the same answer.

Every script of `fixtures.scripts` is sent as a whole, then cut in two, then byte by
byte; and what Postgres answers is cut on its way to the proxy. The reference is the
answer to the whole in the same mode, which `test_differential` compares with
Postgres's own. In auto mode a script is cut at every place, unless it is long or one
of many that are alike; in the others at a tenth of the places.

Runs of a script share a connection, as `DISCARD ALL` leaves nothing of it, and
several lanes, each a database of its own, go in step: while one part is sent on
all lanes the proxy reads the part before.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from urllib.parse import urlsplit

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
from tests.fixtures.faults import FakeServer, add_databases
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

#: Modes in which also the servers' bytes are cut.
RECUT_MODES = (PoolMode.SESSION, PoolMode.AUTO)

#: Bytes of a script or an answer that are sent each on its own.
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
    share = 1.0 if mode is PoolMode.AUTO and family not in ALIKE else 0.1
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


class Recut:
    """A way to Postgres on which its bytes are cut otherwise."""

    def __init__(self, dsn: str) -> None:
        url = urlsplit(dsn)
        self._address = (url.hostname or "", url.port or 0)
        self._chance = random.Random(dsn)
        self.cut: Cut = whole_parts
        listening = socket.create_server(("127.0.0.1", 0))
        self.dsn = url._replace(
            netloc=f"{url.username}:{url.password}@127.0.0.1"
            f":{listening.getsockname()[1]}"
        ).geturl()
        self.server = FakeServer(self._relay, listening)

    def _relay(self, proxy: socket.socket) -> None:
        with socket.create_connection(self._address) as postgres:
            for each in (proxy, postgres):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self._answer, args=[postgres, proxy])
            answers.start()
            while part := proxy.recv(65536):
                postgres.sendall(part)
            postgres.shutdown(socket.SHUT_WR)
            answers.join()

    def _answer(self, postgres: socket.socket, proxy: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := postgres.recv(65536):
                for part in self.cut(data, self._chance):
                    proxy.sendall(part)
                    time.sleep(0)  # the proxy's turn
            proxy.shutdown(socket.SHUT_WR)


Cut = Callable[[bytes, random.Random], Iterable[bytes]]


#: What cuts, whose servers are behind it, and the names of the database by mode.
Way = tuple[Recut, Organization, dict[PoolMode, str]]


def whole_parts(data: bytes, chance: random.Random) -> Iterator[bytes]:
    yield data


def single_bytes(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Bytes on their own; of a long answer some of each part that comes."""
    size = len(data) if len(data) < EACH_BYTE else EACH_BYTE // 8
    for place in range(size):
        yield data[place : place + 1]
    if data[size:]:
        yield data[size:]


def random_parts(data: bytes, chance: random.Random) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        size = chance.choice((1, 2, 3, 5, 8, 21, 55, 1000, 9000))
        yield data[place : place + size]
        place += size


@pytest.fixture(scope="module")
def ways(
    proxy: Proxy,
) -> Iterator[list[Way]]:
    """Organisations whose servers are behind a Recut each, and their databases."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(LANES):
            organization = prepared(proxy)
            recut = Recut(organization.direct_dsn)
            stack.enter_context(recut.server)
            names = {
                mode: asyncio.run(add_databases(organization, [recut.dsn], mode))[0]
                for mode in RECUT_MODES
            }
            made.append((recut, organization, names))
        yield made


@pytest.mark.parametrize(
    ("mode", "cut"),
    [
        (PoolMode.SESSION, random_parts),
        (PoolMode.AUTO, single_bytes),
        (PoolMode.AUTO, random_parts),
    ],
)
@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: family.__name__.rsplit(".")[-1]
)
def test_an_answer_cut_on_its_way_from_postgres_is_passed_on_the_same(
    ways: list[Way],
    mode: PoolMode,
    family: ModuleType,
    cut: Cut,
) -> None:
    lanes = Lanes([way[1].dsn(way[2][mode]) for way in ways])
    names = names_in(family, mode)
    try:
        expected = lanes.references([SCRIPTS[name] for name in names])
        for recut, _, _ in ways:
            recut.cut = cut
        answers = lanes.run([(SCRIPTS[n], [whole(SCRIPTS[n])]) for n in names])
    finally:
        for recut, _, _ in ways:
            recut.cut = whole_parts
        lanes.close()
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert answer == expected[number][number % LANES], name
