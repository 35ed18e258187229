"""What a client makes of its session lasts, on whichever server it is served."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors, sql

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import FLUSH, SYNC, Wire, bind, execute, kinds, parse, query

SHARED = (PoolMode.TRANSACTION, PoolMode.AUTO)
PID = "SELECT pg_backend_pid()"


@pytest.fixture(scope="module")
def small(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy with two servers for each database."""
    settings = {"OGELPROXY_POOL_MAX_SERVERS": "2"}
    proxy = Proxy(postgres, tmp_path_factory.mktemp("sessions"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def tenant(small: Proxy) -> Organization:
    return small.create_organization(limiter=LimiterMode.OFF)


def as_superuser(tenant: Organization) -> Organization:
    role = psycopg.conninfo.conninfo_to_dict(tenant.direct_dsn)["user"]
    with psycopg.connect(tenant.proxy.postgres.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("ALTER ROLE {} SUPERUSER").format(sql.Identifier(str(role)))
        )
    return tenant


def value(connection: psycopg.Connection, statement: str) -> object:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row[0]


class Elsewhere:
    """Holds the server that a client used last, so that it gets the other one."""

    def __init__(self, tenant: Organization, mode: PoolMode) -> None:
        self.rivals = [tenant.connect(str(mode)) for _ in range(2)]

    def move(self, client: psycopg.Connection) -> None:
        """Make the client's next server another than its last."""
        last = value(client, PID)
        for rival in self.rivals:
            rival.rollback()
            rival.execute("BEGIN")
            if value(rival, PID) == last:
                break
            rival.execute("ROLLBACK")

    def close(self) -> None:
        for rival in self.rivals:
            rival.close()


@pytest.fixture(params=SHARED)
def mode(request: pytest.FixtureRequest) -> PoolMode:
    found: PoolMode = request.param
    return found


@pytest.fixture
def elsewhere(tenant: Organization, mode: PoolMode) -> Iterator[Elsewhere]:
    made = Elsewhere(tenant, mode)
    yield made
    made.close()


SETTINGS = (
    ("SET work_mem = '3MB'", "work_mem", "3MB"),
    ("SET SESSION work_mem TO '5MB'", "work_mem", "5MB"),
    ("SELECT set_config('work_mem', '7MB', false)", "work_mem", "7MB"),
    ("SET search_path = other, public", "search_path", "other, public"),
    ("SET TIME ZONE 'Asia/Tokyo'", "TimeZone", "Asia/Tokyo"),
    ("SET NAMES 'LATIN1'", "client_encoding", "LATIN1"),
    ("SET my.own = 'it''s \\ odd'", "my.own", "it's \\ odd"),
    ('SET "My".Own = 1', "my.own", "1"),
    (
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "default_transaction_read_only",
        "on",
    ),
    ("BEGIN; SET work_mem = '9MB'; COMMIT", "work_mem", "9MB"),
    ("/* SET */ set\n\twork_mem = '2MB' -- x", "work_mem", "2MB"),
)


@pytest.mark.parametrize(("statement", "name", "expected"), SETTINGS)
def test_a_setting_follows_its_client_and_nobody_else(
    tenant: Organization,
    mode: PoolMode,
    elsewhere: Elsewhere,
    statement: str,
    name: str,
    expected: str,
) -> None:
    show = f"SELECT current_setting('{name}', true)"
    with tenant.connect(str(mode)) as client, tenant.connect(str(mode)) as other:
        before = value(other, show)
        client.execute(statement)
        first = value(client, PID)
        assert value(client, show) == expected
        elsewhere.move(client)
        assert value(client, PID) != first
        assert value(client, show) == expected
        assert value(other, show) in (before, "")


@pytest.mark.parametrize(
    "statement",
    [
        "BEGIN; SET work_mem = '9MB'; ROLLBACK",
        "BEGIN; SET LOCAL work_mem = '9MB'; COMMIT",
        "SELECT set_config('work_mem', '9MB', true)",
        "SET work_mem = '9MB'; RESET work_mem",
        "SET work_mem = '9MB'; SET work_mem TO DEFAULT",
        "SET work_mem = '9MB'; RESET ALL",
    ],
)
def test_a_setting_that_was_undone_does_not_follow(
    tenant: Organization, mode: PoolMode, elsewhere: Elsewhere, statement: str
) -> None:
    with tenant.connect(str(mode)) as client:
        before = value(client, "SHOW work_mem")
        client.execute(statement)
        assert value(client, "SHOW work_mem") == before
        elsewhere.move(client)
        assert value(client, "SHOW work_mem") == before


@pytest.mark.parametrize("undone", ["RESET", "DEFAULT", "RESET ALL", "DISCARD ALL"])
@pytest.mark.parametrize("way", [*SHARED, PoolMode.SESSION])
def test_undone_a_setting_is_what_it_was_at_the_start(
    tenant: Organization, way: PoolMode, undone: str
) -> None:
    statement = {
        "RESET": "RESET work_mem",
        "DEFAULT": "SET work_mem TO DEFAULT",
    }.get(undone, undone)
    with tenant.connect(str(way), options="-c work_mem=6MB") as client:
        client.execute("SET work_mem = '9MB'")
        client.execute(statement)
        assert value(client, "SHOW work_mem") == "6MB"


@pytest.mark.parametrize("way", [*SHARED, PoolMode.SESSION])
def test_a_reset_leaves_the_batch_alone_that_it_is_in(
    tenant: Organization, way: PoolMode
) -> None:
    with Wire(tenant.dsn(str(way)), {"work_mem": "6MB"}) as wire:
        # A query of the proxy's own would take its portals, and commit what it did.
        wire.send(parse("RESET work_mem") + bind(portal="p") + parse("SELECT 42"))
        wire.send(bind() + execute("p") + FLUSH)
        wire.until("C")
        assert kinds(wire.ask(execute(), SYNC)) == "DCZ"
        got = wire.ask(query("SHOW work_mem"))
        assert got[1].body.endswith(b"6MB")


def test_values_are_the_same_in_every_encoding(
    tenant: Organization, mode: PoolMode, elsewhere: Elsewhere
) -> None:
    text = "é ü ß \\ '' 'x'"
    show = "SELECT current_setting('app.name', true)"
    with (
        tenant.connect(str(mode), client_encoding="utf8") as one,
        tenant.connect(str(mode), client_encoding="latin1") as two,
        tenant.connect(str(mode), client_encoding="win1251") as three,
    ):
        for client in (one, two):
            client.execute(
                sql.SQL("SET app.name = {}").format(
                    sql.Literal(text + client.info.encoding)
                )
            )
        for _ in range(3):
            for client in (one, two):
                assert value(three, "SELECT 1") == 1
                assert value(client, show) == text + client.info.encoding
                elsewhere.move(client)


def test_a_setting_that_may_not_be_made_ends_nobody(
    tenant: Organization, mode: PoolMode, elsewhere: Elsewhere
) -> None:
    with tenant.connect(str(mode)) as client:
        with pytest.raises(errors.InsufficientPrivilege):
            client.execute("SET log_statement = 'all'")
        with pytest.raises(errors.UndefinedObject):
            client.execute("SET no_such_setting = 1")
        for _ in range(3):
            elsewhere.move(client)
            assert value(client, "SELECT 1") == 1


def test_a_role_follows_its_client(
    tenant: Organization, mode: PoolMode, elsewhere: Elsewhere
) -> None:
    own = value(psycopg.connect(tenant.direct_dsn), "SELECT current_user")
    with tenant.connect(str(mode)) as client, tenant.connect(str(mode)) as other:
        as_superuser(tenant)
        client.execute("CREATE ROLE o7s_follower")
        try:
            client.execute("SET ROLE o7s_follower")
            elsewhere.move(client)
            assert value(client, "SELECT current_user") == "o7s_follower"
            assert value(other, "SELECT current_user") == own
            client.execute("RESET ROLE")
            elsewhere.move(client)
            assert value(client, "SELECT current_user") == own
            client.execute("SET SESSION AUTHORIZATION o7s_follower")
            elsewhere.move(client)
            assert value(client, "SELECT session_user") == "o7s_follower"
            assert value(other, "SELECT session_user") == own
            client.execute("RESET SESSION AUTHORIZATION")
        finally:
            client.execute("DROP ROLE o7s_follower")


def test_many_settings_at_once_are_told_to_a_client_that_pipelines(
    tenant: Organization, mode: PoolMode
) -> None:
    with Wire(tenant.dsn(str(mode))) as wire:
        wire.send(
            query("SET work_mem = '3MB'")
            + query("SHOW work_mem")
            + query("SET work_mem = '4MB'")
            + parse("SHOW work_mem")
            + bind()
            + execute()
            + SYNC
        )
        got = [m for _ in range(4) for m in wire.until("Z")]
        assert [m.body[6:] for m in got if m.kind == "D"] == [b"3MB", b"4MB"]
        got = wire.ask(query("SHOW work_mem"))
        assert got[1].body.endswith(b"4MB")


STATE = (
    ("CREATE TEMP TABLE t (a int)", "DROP TABLE t", "temporary objects"),
    ("SELECT pg_advisory_lock(3)", "SELECT pg_advisory_unlock(3)", "advisory locks"),
    (
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "CLOSE c",
        "cursors WITH HOLD",
    ),
    ("PREPARE p AS SELECT 1", "DEALLOCATE p", "PREPARE"),
)


@pytest.mark.parametrize(("statement", "ending", "reason"), STATE)
def test_a_client_is_pinned_while_it_has_state_and_released_after(
    tenant: Organization, statement: str, ending: str, reason: str
) -> None:
    def pins() -> list[tuple[object, ...]]:
        return watcher.execute("SHOW o7s.pins").fetchall()

    with tenant.connect("auto") as client, tenant.connect("auto") as watcher:
        before = counted(tenant.proxy, reason)
        client.execute(statement)
        mine = value(client, PID)
        assert value(watcher, PID) != mine
        assert any(reason in str(row) for row in pins())
        assert counted(tenant.proxy, reason) == before + 1
        client.execute(ending)
        end = time.monotonic() + 5
        while pins():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert value(watcher, PID) in (value(client, PID), mine)


def counted(proxy: Proxy, reason: str) -> float:
    with urllib.request.urlopen(proxy.admin_url("/metrics"), timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(
        rf'^o7s_pins_total{{reason="{re.escape(reason)}"}} (\S+)$', text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def test_state_made_in_vain_pins_nobody(tenant: Organization) -> None:
    with tenant.connect("auto") as client, tenant.connect("auto") as watcher:
        for statement in (
            "BEGIN; CREATE TEMP TABLE t (a int); ROLLBACK",
            "SELECT 1 WHERE pg_try_advisory_lock(4) AND pg_advisory_unlock(4)",
            "DISCARD ALL",
        ):
            client.execute(statement)
        assert not watcher.execute("SHOW o7s.pins").fetchall()
        assert value(watcher, PID) == value(client, PID)


def test_a_pinned_client_that_leaves_leaves_nothing_behind(
    tenant: Organization,
) -> None:
    with tenant.connect("auto") as client:
        client.execute("CREATE TEMP TABLE t (a int)")
        client.execute("SELECT pg_advisory_lock(5)")
        client.execute("SET work_mem = '3MB'")
        client.execute("PREPARE p AS SELECT 1")
        mine = value(client, PID)
    with tenant.connect("auto") as one, tenant.connect("auto") as two:
        for other in (one, two):
            other.execute("BEGIN")
        assert mine in (value(one, PID), value(two, PID))
        assert value(one, "SELECT pg_try_advisory_xact_lock(5)")
        for other in (one, two):
            assert value(other, "SELECT to_regclass('pg_temp.t')") is None
            assert value(other, "SHOW work_mem") != "3MB"
            count = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"
            assert value(other, count) == 0


def test_a_client_that_asks_for_debug_notices_hears_of_pins(
    tenant: Organization,
) -> None:
    with tenant.connect("auto") as client:
        heard: list[str] = []
        client.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        client.execute("SET client_min_messages = debug1")
        client.execute("SELECT pg_advisory_lock(6)")
        end = time.monotonic() + 5
        while not any("advisory locks" in text for text in heard):
            assert time.monotonic() < end, heard
            value(client, "SELECT 1")


def test_lastval_is_never_another_clients(tenant: Organization, mode: PoolMode) -> None:
    with tenant.connect(str(mode)) as one, tenant.connect(str(mode)) as two:
        one.execute("CREATE SEQUENCE drawn")
        value(one, "SELECT nextval('drawn')")
        assert value(one, "SELECT lastval()") == 1
        value(one, "SELECT nextval('drawn')")
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            value(two, "SELECT lastval()")
        if mode is PoolMode.AUTO:
            value(one, "SELECT nextval('drawn')")
            assert value(one, "SELECT currval('drawn')") == 3


def test_statements_prepared_in_sql_and_by_the_protocol_are_one_space_of_names(
    tenant: Organization, mode: PoolMode
) -> None:
    with Wire(tenant.dsn(str(mode))) as wire:
        wire.ask(parse("SELECT 42", "s"), SYNC)
        assert kinds(wire.ask(query("EXECUTE s"))) == "TDCZ"
        got = wire.ask(query("PREPARE s AS SELECT 1"))
        assert [m.fields()["C"] for m in got if m.kind == "E"] == ["42P05"]
        assert kinds(wire.ask(query("PREPARE q (int) AS SELECT $1"))) == "CZ"
        got = wire.ask(bind((b"7",), "q"), execute(), SYNC)
        assert kinds(got) == "2DCZ"
        assert kinds(wire.ask(query("DEALLOCATE s; DEALLOCATE q"))) == "CCZ"
        got = wire.ask(bind((), "s"), execute(), SYNC)
        assert [m.fields()["C"] for m in got if m.kind == "E"] == ["26000"]
