"""What belongs to one client or organisation never reaches another."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql

from ogelproxy.config import Secret
from ogelproxy.tenants.model import DatabaseType, LimiterMode, PoolMode
from ogelproxy.tenants.store import Store
from tests.fixtures.engine import ACTOR, MODES, Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    SYNC,
    Message,
    Wire,
    bind,
    describe_portal,
    execute,
    kinds,
    parse,
    query,
)

SHARED = (PoolMode.TRANSACTION, PoolMode.AUTO)


@pytest.fixture(scope="module")
def pair(proxy: Proxy) -> tuple[Organization, Organization]:
    """Two organisations with the same names of everything, and other content."""
    made = []
    for color in ("red", "blue"):
        organization = proxy.create_organization(limiter=LimiterMode.OFF)
        with psycopg.connect(organization.direct_dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE secret (id int PRIMARY KEY, text text)")
            connection.execute(
                "INSERT INTO secret SELECT n, %s || n FROM generate_series(1, 100) n",
                [color],
            )
        made.append(organization)
    return made[0], made[1]


@pytest.fixture
def crowded(postgres: Postgres, own_proxy: Proxy) -> Iterator[Organization]:
    """An organisation whose clients all share one server."""
    own_proxy.settings["OGELPROXY_POOL_MAX_SERVERS"] = "1"
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    own_proxy.start()
    yield organization


class Talker:
    """A client that knows what it must and what it must not hear."""

    def __init__(self, wire: Wire, color: str, number: int) -> None:
        self.wire = wire
        self.color = color
        # Every client gives the same names, and means something else by them.
        self.offsets = {f"s{n}": (n * 7 + number) % 10 for n in range(5)}
        self.expected: list[bytes] = []
        wire.ask(
            *[
                parse(
                    f"SELECT text, '{color}', {offset} FROM secret"
                    f" WHERE id = $1::int + {offset}",
                    name,
                )
                for name, offset in self.offsets.items()
            ],
            SYNC,
        )

    def begin(self, chance: random.Random) -> None:
        """Send a transaction; its answer is taken later."""
        name = chance.choice(list(self.offsets))
        number = chance.randint(1, 90)
        offset = self.offsets[name]
        use = bind((b"%d" % number,), name) + execute()
        text = f"SELECT text, '{self.color}', {offset} FROM secret WHERE id = "
        row = (f"{self.color}{number + offset}", self.color, str(offset))
        shape = chance.randrange(4)
        if shape == 0:
            self.wire.send(use + SYNC)
            self.ends = "Z"
        elif shape == 1:
            self.wire.send(query("BEGIN") + use + SYNC + query("COMMIT"))
            self.ends = "ZZZ"
        elif shape == 2:
            self.wire.send(query(text + str(number + offset)))
            self.ends = "Z"
        else:
            unnamed = parse(text + "$1::int") + bind((b"%d" % (number + offset),))
            self.wire.send(unnamed + describe_portal() + execute() + SYNC)
            self.ends = "Z"
        self.row = tuple(part.encode() for part in row)

    def hear(self) -> None:
        answer = self.wire.until(self.ends)
        assert "E" not in kinds(answer), [each.fields() for each in answer]
        assert [cells(each) for each in answer if each.kind == "D"] == [self.row]


def cells(row: Message) -> tuple[bytes, ...]:
    count, found, place = int.from_bytes(row.body[:2], "big"), [], 2
    for _ in range(count):
        (size,) = struct.unpack_from(">i", row.body, place)
        found.append(row.body[place + 4 : place + 4 + size])
        place += 4 + size
    return tuple(found)


@pytest.mark.parametrize("mode", SHARED)
def test_two_organizations_at_random_hear_only_their_own(
    pair: tuple[Organization, Organization], mode: PoolMode
) -> None:
    chance = random.Random(7)
    talkers = [
        Talker(Wire(organization.dsn(str(mode))), color, number)
        for organization, color in zip(pair, ("red", "blue"), strict=True)
        for number in range(5)
    ]
    try:
        for _ in range(400):
            speaking = chance.sample(talkers, 5)
            for talker in speaking:
                talker.begin(chance)
            chance.shuffle(speaking)
            for talker in speaking:
                talker.hear()
    finally:
        for talker in talkers:
            talker.wire.sock.close()


@pytest.mark.parametrize("mode", MODES)
def test_servers_are_never_shared_between_organizations(
    proxy: Proxy, pair: tuple[Organization, Organization], mode: PoolMode
) -> None:
    """Not even when both reach the very same database as the same role."""
    first, second = pair

    async def reach_the_same(store: Store) -> None:
        for organization in pair:
            await store.create_database(
                organization.handle,
                f"same_{mode}",
                DatabaseType.POSTGRES,
                Secret(first.direct_dsn),
                mode,
                actor=ACTOR,
            )

    proxy.operate(reach_the_same)

    def servers(organization: Organization) -> set[int]:
        found = set()
        for _ in range(20):
            with organization.connect(f"same_{mode}") as connection:
                row = connection.execute("SELECT pg_backend_pid()").fetchone()
                assert row is not None
                found.add(row[0])
        return found

    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(servers, pair)
    assert ours and theirs
    assert not ours & theirs
    assert second.handle != first.handle


def test_a_server_has_the_role_and_database_of_its_organization(
    pair: tuple[Organization, Organization],
) -> None:
    for organization in pair:
        with psycopg.connect(organization.direct_dsn) as direct:
            expected = direct.execute("SELECT current_user, current_database()")
            mine = expected.fetchone()
        for mode in MODES:
            with organization.connect(str(mode)) as connection:
                row = connection.execute(
                    "SELECT usename, datname FROM pg_stat_activity"
                    " WHERE pid = pg_backend_pid()"
                ).fetchone()
                assert row == mine


STATES = {
    "a setting": ("SET work_mem = '3MB'", "SELECT current_setting('work_mem')"),
    "a search path": (
        "SET search_path = elsewhere",
        "SELECT current_setting('search_path')",
    ),
    "a setting by function": (
        "SELECT set_config('my.secret', 'mine', false)",
        "SELECT coalesce(current_setting('my.secret', true), '')",
    ),
    "a role": ("SET ROLE pg_monitor", "SELECT current_user"),
    "a temporary table": (
        "CREATE TEMP TABLE mine AS SELECT 1",
        "SELECT to_regclass('mine')",
    ),
    "an advisory lock": (
        "SELECT pg_advisory_lock(5)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
    ),
    "a channel": ("LISTEN mine", "SELECT count(*) FROM pg_listening_channels()"),
    "a prepared statement": (
        "PREPARE mine AS SELECT 1",
        "SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'",
    ),
    "a cursor": (
        "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE name = 'mine'",
    ),
}


@pytest.fixture
def crowded_with_state(crowded: Organization) -> Organization:
    role = psycopg.conninfo.conninfo_to_dict(crowded.direct_dsn)["user"]
    assert isinstance(role, str)
    database = crowded.direct_dsn.rsplit("/", 1)[1]
    crowded.proxy.postgres.execute(
        sql.SQL("GRANT pg_monitor TO {}").format(sql.Identifier(role)), database
    )
    with psycopg.connect(crowded.direct_dsn, autocommit=True) as connection:
        connection.execute("CREATE SEQUENCE counter")
    return crowded


def shows(connection: psycopg.Connection, question: str) -> object:
    row = connection.execute(question).fetchone()
    assert row is not None
    return row[0]


def test_state_of_a_client_is_never_seen_by_the_next_one(
    crowded_with_state: Organization,
) -> None:
    """With one server for all, what a client leaves is what the next one finds."""
    for mode in MODES:
        for what, (make, question) in STATES.items():
            with crowded_with_state.connect(str(mode)) as clean:
                before = shows(clean, question)
            for is_prepared in (False, True):
                with crowded_with_state.connect(str(mode)) as maker:
                    server = shows(maker, "SELECT pg_backend_pid()")
                    maker.execute(make, prepare=is_prepared)
                with crowded_with_state.connect(str(mode)) as other:
                    assert shows(other, "SELECT pg_backend_pid()") == server
                    assert shows(other, question) == before, (mode, what)


def test_state_of_an_open_client_is_not_seen_in_transaction_mode(
    crowded_with_state: Organization,
) -> None:
    with (
        crowded_with_state.connect("transaction") as maker,
        crowded_with_state.connect("transaction") as other,
    ):
        for what, (make, question) in STATES.items():
            before = shows(other, question)
            maker.execute(make)
            assert shows(other, question) == before, what


def test_a_sequence_remembers_for_nobody_else(
    crowded_with_state: Organization,
) -> None:
    with crowded_with_state.connect("session") as maker:
        maker.execute("SELECT nextval('counter')")
        assert shows(maker, "SELECT lastval()") == 1
    with (
        crowded_with_state.connect("session") as other,
        pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState),
    ):
        other.execute("SELECT lastval()")


def test_a_transaction_left_open_is_rolled_back(crowded: Organization) -> None:
    with psycopg.connect(crowded.direct_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE entry (id int)")
    for mode in MODES:
        left = Wire(crowded.dsn(str(mode)))
        left.ask(query("BEGIN; INSERT INTO entry VALUES (1); SET LOCAL work_mem='2MB'"))
        left.sock.close()
        with crowded.connect(str(mode)) as other:
            assert shows(other, "SELECT count(*) FROM entry") == 0
            assert shows(other, "SHOW work_mem") != "2MB"


def test_statements_of_the_same_name_stay_apart(crowded: Organization) -> None:
    with (
        Wire(crowded.dsn("transaction")) as first,
        Wire(crowded.dsn("transaction")) as second,
    ):
        first.ask(parse("SELECT 'first'", "s"), SYNC)
        second.ask(parse("SELECT 'second'", "s"), SYNC)
        for _ in range(3):
            for wire, mine in ((first, b"first"), (second, b"second")):
                got = wire.ask(bind((), "s"), execute(), SYNC)
                assert [cells(each) for each in got if each.kind == "D"] == [(mine,)]


def test_the_unnamed_statement_of_another_client_is_never_run(
    crowded: Organization,
) -> None:
    with (
        Wire(crowded.dsn("transaction")) as first,
        Wire(crowded.dsn("transaction")) as second,
        Wire(crowded.dsn("transaction")) as third,
    ):
        first.ask(parse("SELECT 'first'"), SYNC)
        second.ask(parse("SELECT 'second'"), SYNC)
        for wire, mine in ((first, b"first"), (second, b"second")) * 2:
            got = wire.ask(bind(), execute(), SYNC)
            assert [cells(each) for each in got if each.kind == "D"] == [(mine,)]
        # The skipped Parse leaves nothing, so nothing of the others' is bound.
        third.send(bind((), "nobody") + parse("SELECT 'third'") + SYNC)
        third.send(bind() + execute() + SYNC)
        answers = third.until("ZZ")
        assert kinds(answers) == "EZEZ"
        assert answers[2].fields()["C"] == "26000"


def test_notifications_stay_with_who_listens(
    pair: tuple[Organization, Organization],
) -> None:
    red, blue = pair
    with (
        red.connect("auto") as listener,
        red.connect("auto") as silent,
        blue.connect("auto") as other_listener,
        red.connect("auto") as teller,
    ):
        listener.execute("LISTEN news")
        other_listener.execute("LISTEN news")
        silent.execute("SELECT 1")
        teller.execute("NOTIFY news, 'red'")
        heard = next(listener.notifies(timeout=5))
        assert heard.payload == "red"
        assert not list(silent.notifies(timeout=0.05))
        assert not list(other_listener.notifies(timeout=0.05))


def test_a_cancel_key_cancels_only_its_own_client(
    pair: tuple[Organization, Organization],
) -> None:
    red, blue = pair
    with (
        Wire(red.dsn("transaction")) as victim,
        Wire(blue.dsn("transaction")) as other,
        Wire(red.dsn("transaction")) as bystander,
    ):
        victim.send(query("SELECT pg_sleep(1.0)"))
        other.cancel()  # a key of its own, with nothing to cancel
        bystander.cancel()
        # Neither a guessed secret nor another's secret will do.
        for secret in (other.secret, b"\0\0\0\0", victim.secret + b"\0"):
            forged(other, victim.process_id, secret).cancel()
        assert kinds(victim.until("Z")) == "TDCZ"
        victim.send(query("SELECT pg_sleep(60)"))
        while not runs(red):
            pass
        victim.cancel()
        answer = victim.until("Z")
        assert [e.fields()["C"] for e in answer if e.kind == "E"] == ["57014"]


def runs(organization: Organization) -> bool:
    with psycopg.connect(organization.direct_dsn) as connection:
        return bool(
            connection.execute(
                "SELECT FROM pg_stat_activity WHERE state = 'active'"
                " AND query = 'SELECT pg_sleep(60)' AND datname = current_database()"
            ).rowcount
        )


def forged(wire: Wire, process_id: int, secret: bytes) -> Wire:
    """A copy of `wire` that cancels with another key."""
    made = copy.copy(wire)
    made.process_id, made.secret = process_id, secret
    return made


def test_a_late_cancel_never_hits_the_next_client(crowded: Organization) -> None:
    with (
        Wire(crowded.dsn("transaction")) as hasty,
        Wire(crowded.dsn("transaction")) as next_one,
    ):
        for _ in range(40):
            hasty.send(query("SELECT 1"))
            hasty.cancel()
            next_one.send(query("SELECT pg_sleep(0.002)"))
            assert kinds(next_one.until("Z")) == "TDCZ"
            # It may be hit wherever it is, but not behind its end.
            assert kinds(hasty.until("Z")) in ("TDCZ", "EZ", "TEZ", "TDEZ")


def test_keys_differ_between_connections(
    pair: tuple[Organization, Organization],
) -> None:
    seen = set()
    for organization in pair:
        for _ in range(10):
            with Wire(organization.dsn("auto")) as wire:
                seen.add((wire.process_id, wire.secret))
                # A server's own key must not be told.
                got = wire.ask(query("SELECT pg_backend_pid()"))
                assert cells(got[1]) != (str(wire.process_id).encode(),)
    assert len({secret for _, secret in seen}) == 20


def test_a_key_opens_only_its_own_organization(
    pair: tuple[Organization, Organization],
) -> None:
    red, blue = pair
    with pytest.raises(ConnectionRefusedError):
        Wire(replace(red, key=blue.key).dsn())


@pytest.mark.parametrize(
    "refused", ["log_statement = 'all'", "server_version = '1'", "max_connections = 5"]
)
def test_a_setting_that_is_refused_to_a_client_is_no_matter_to_the_next(
    crowded: Organization, refused: str
) -> None:
    for _ in range(3):
        with Wire(crowded.dsn("auto")) as first:
            assert kinds(first.ask(query(f"SET {refused}"))) == "EZ"
            assert kinds(first.ask(query("SELECT 1"))) == "TDCZ"
        with Wire(crowded.dsn("auto")) as other:
            assert kinds(other.ask(query("SELECT 1"))) == "TDCZ"
