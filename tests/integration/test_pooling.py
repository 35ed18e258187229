"""Servers are lent, shared, kept, reset and closed as the pool mode says."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    FLUSH,
    SYNC,
    Wire,
    bind,
    close_statement,
    execute,
    kinds,
    parse,
    query,
)

SHARED = (PoolMode.TRANSACTION, PoolMode.AUTO)
MAX_SERVERS = 2
QUEUE_TIMEOUT = 0.5
PID = "SELECT pg_backend_pid()"


@pytest.fixture(scope="module")
def small(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy with few servers and few statements on each."""
    settings = {
        "OGELPROXY_POOL_MAX_SERVERS": str(MAX_SERVERS),
        "OGELPROXY_POOL_MAX_PREPARED_STATEMENTS": "3",
    }
    proxy = Proxy(postgres, tmp_path_factory.mktemp("small"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def tenant(small: Proxy) -> Organization:
    return small.create_organization(limiter=LimiterMode.OFF)


@pytest.fixture
def hasty(own_proxy: Proxy) -> Organization:
    """An organisation of a proxy without patience."""
    own_proxy.settings |= {
        "OGELPROXY_POOL_MAX_SERVERS": str(MAX_SERVERS),
        "OGELPROXY_POOL_QUEUE_TIMEOUT": str(QUEUE_TIMEOUT),
        "OGELPROXY_POOL_SERVER_IDLE_TIMEOUT": "1",
    }
    own_proxy.start()
    return own_proxy.create_organization(limiter=LimiterMode.OFF)


def server_of(connection: psycopg.Connection) -> int:
    row = connection.execute(PID).fetchone()
    assert row is not None
    pid: int = row[0]
    return pid


def servers(organization: Organization) -> set[int]:
    """The servers that the organisation has at this moment."""
    proxy = organization.proxy
    database = organization.direct_dsn.rsplit("/", 1)[1]
    with psycopg.connect(proxy.postgres.dsn(), autocommit=True) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = %s AND backend_type = 'client backend'",
            [database],
        )
        return {row[0] for row in rows}


def wait_for_servers(organization: Organization, count: int) -> set[int]:
    end = time.monotonic() + 10
    while len(found := servers(organization)) != count:
        assert time.monotonic() < end, f"{found}, not {count} of them"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("mode", SHARED)
def test_many_clients_share_few_servers(tenant: Organization, mode: PoolMode) -> None:
    def work(number: int) -> set[int]:
        used = set()
        with tenant.connect(str(mode)) as connection:
            for _ in range(20):
                with connection.transaction():
                    used.add(server_of(connection))
                    row = connection.execute("SELECT %s::int", [number]).fetchone()
                    assert row == (number,)
        return used

    with ThreadPoolExecutor(20) as pool:
        used = set().union(*pool.map(work, range(20)))
    assert len(used) <= MAX_SERVERS
    assert servers(tenant) <= used


@pytest.mark.parametrize("mode", SHARED)
def test_an_idle_client_holds_no_server(tenant: Organization, mode: PoolMode) -> None:
    clients = [tenant.connect(str(mode)) for _ in range(6)]
    try:
        assert len({server_of(client) for client in clients}) == 1
    finally:
        for client in clients:
            client.close()


def test_a_session_keeps_its_server(tenant: Organization) -> None:
    with tenant.connect("session") as first, tenant.connect("session") as second:
        ours = {server_of(first) for _ in range(5)}
        theirs = {server_of(second) for _ in range(5)}
    assert len(ours) == len(theirs) == 1
    assert ours != theirs


def test_servers_serve_one_session_after_another(tenant: Organization) -> None:
    used = set()
    for _ in range(3 * MAX_SERVERS):
        with tenant.connect("session") as connection:
            used.add(server_of(connection))
    assert len(used) <= MAX_SERVERS


PINNING = (
    "PREPARE mine AS SELECT 1",
    "SELECT setseed(0.5)",
    "DO 'BEGIN CREATE TEMP TABLE mine (a int); END'",
    "DO 'BEGIN PERFORM set_config(''enable_sort'', ''off'', false); END'",
    "CREATE TEMP TABLE mine (a int)",
    "SELECT 1 AS a INTO TEMP mine",
    "SELECT pg_advisory_lock(9)",
    "SELECT pg_try_advisory_lock_shared(9)",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "LOAD 'plpgsql'",
)
SHARING = (
    "SELECT 1",
    "SET work_mem = '3MB'",
    "SET search_path = other",
    "SELECT set_config('my.value', 'x', false)",
    "SET ROLE NONE",
    "RESET ALL",
    "LISTEN mine",
    "SELECT 1 AS lastval",
    "DO 'BEGIN PERFORM 1; END'",
    "SELECT pg_advisory_lock(9), pg_advisory_unlock(9)",
    "BEGIN; CREATE TEMP TABLE mine (a int) ON COMMIT DROP; COMMIT",
    "BEGIN; LISTEN mine; ROLLBACK",
    "CREATE TABLE IF NOT EXISTS lasting (a int)",
    "BEGIN; SET LOCAL work_mem = '3MB'; COMMIT",
    "BEGIN; SELECT pg_advisory_xact_lock(9); COMMIT",
    "BEGIN; DECLARE c CURSOR FOR SELECT 1; COMMIT",
    "NOTIFY mine",
    "SELECT 'LISTEN mine; SET work_mem'",
)


@pytest.mark.parametrize("statement", PINNING)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_auto_mode_keeps_the_server_of_a_client_with_state(
    tenant: Organization, statement: str, is_prepared: bool
) -> None:
    if statement.startswith("LOAD"):
        tenant = as_superuser(tenant)
    with tenant.connect("auto") as pinned, tenant.connect("auto") as other:
        before = server_of(other)
        pinned.execute(statement, prepare=is_prepared)
        mine = server_of(pinned)
        assert mine == before
        assert server_of(other) != mine
        assert {server_of(pinned) for _ in range(3)} == {mine}


def as_superuser(tenant: Organization) -> Organization:
    role = psycopg.conninfo.conninfo_to_dict(tenant.direct_dsn)["user"]
    with psycopg.connect(tenant.proxy.postgres.dsn(), autocommit=True) as connection:
        connection.execute(
            psycopg.sql.SQL("ALTER ROLE {} SUPERUSER").format(
                psycopg.sql.Identifier(str(role))
            )
        )
    return tenant


@pytest.mark.parametrize("statement", SHARING)
def test_auto_mode_shares_the_server_of_a_client_without_state(
    tenant: Organization, statement: str
) -> None:
    with tenant.connect("auto") as first, tenant.connect("auto") as second:
        first.execute(statement)
        assert server_of(first) == server_of(second)


def test_a_pinned_server_is_reset_and_used_again(tenant: Organization) -> None:
    with tenant.connect("auto") as pinned:
        pinned.execute("SET work_mem = '3MB'")
        mine = server_of(pinned)
    others = [tenant.connect("auto") for _ in range(MAX_SERVERS)]
    used = set()
    for other in others:  # in transactions, so that they need every server
        other.execute("BEGIN")
        used.add(server_of(other))
        row = other.execute("SHOW work_mem").fetchone()
        assert row is not None and row[0] != "3MB"
    for other in others:
        other.close()
    assert mine in used


def test_start_up_settings_follow_the_client(tenant: Organization) -> None:
    """Whatever server is lent, it has the client's settings and no others'."""
    clients = [
        tenant.connect(
            "transaction", options=f"-c work_mem={size}MB", application_name=n
        )
        for size, n in ((3, "three"), (4, "four"), (5, "five"))
    ]
    plain = tenant.connect("transaction")
    try:
        default = plain.execute("SHOW work_mem").fetchone()
        for _ in range(4):
            for client, size, name in zip(
                clients, (3, 4, 5), ("three", "four", "five"), strict=True
            ):
                shown = client.execute(
                    "SELECT current_setting('work_mem'), "
                    "current_setting('application_name')"
                ).fetchone()
                assert shown == (f"{size}MB", name)
            assert plain.execute("SHOW work_mem").fetchone() == default
            assert plain.execute("SHOW application_name").fetchone() == ("",)
    finally:
        for client in (*clients, plain):
            client.close()


@pytest.mark.parametrize("mode", SHARED)
def test_more_statements_than_a_server_keeps_are_still_right(
    tenant: Organization, mode: PoolMode
) -> None:
    with (
        Wire(tenant.dsn(str(mode))) as first,
        Wire(tenant.dsn(str(mode))) as second,
    ):
        for wire, factor in ((first, 1), (second, 100)):
            wire.ask(
                *[parse(f"SELECT $1::int + {n * factor}", f"s{n}") for n in range(20)],
                SYNC,
            )
        for turn in range(4):
            for n in range(20):
                for wire, factor in ((first, 1), (second, 100)):
                    number = (n * (turn + 3)) % 20
                    got = wire.ask(bind((b"1",), f"s{number}"), execute(), SYNC)
                    assert kinds(got) == "2DCZ"
                    value = str(1 + number * factor).encode()
                    assert got[1].body.endswith(value)


@pytest.mark.parametrize("mode", SHARED)
def test_a_server_keeps_no_more_statements_than_it_may(
    tenant: Organization, mode: PoolMode
) -> None:
    with Wire(tenant.dsn(str(mode))) as wire:
        for n in range(30):
            wire.ask(parse(f"SELECT {n}", f"s{n}"), bind((), f"s{n}"), execute(), SYNC)
        got = wire.ask(query("SELECT count(*) FROM pg_prepared_statements"))
        assert int(got[1].body[6:]) <= 3


@pytest.mark.parametrize("mode", SHARED)
def test_many_statements_in_one_batch(tenant: Organization, mode: PoolMode) -> None:
    with Wire(tenant.dsn(str(mode))) as wire:
        wire.ask(*[parse(f"SELECT {n}", f"s{n}") for n in range(12)], SYNC)
        use = [bind((), f"s{n % 12}") + execute() for n in range(48)]
        got = wire.ask(*use, SYNC)
        values = [int(each.body[6:]) for each in got if each.kind == "D"]
        assert values == [n % 12 for n in range(48)]


@pytest.mark.parametrize("mode", SHARED)
@pytest.mark.parametrize("command", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_forgetting_all_statements_is_each_clients_own_business(
    tenant: Organization, mode: PoolMode, command: str
) -> None:
    with (
        Wire(tenant.dsn(str(mode))) as first,
        Wire(tenant.dsn(str(mode))) as second,
    ):
        for wire in (first, second):
            wire.ask(parse("SELECT 1", "s"), bind((), "s"), execute(), SYNC)
        first.ask(query(command))
        got = first.ask(bind((), "s"), execute(), SYNC)
        assert [each.fields()["C"] for each in got if each.kind == "E"] == ["26000"]
        assert kinds(second.ask(bind((), "s"), execute(), SYNC)) == "2DCZ"
        got = first.ask(parse("SELECT 2", "s"), bind((), "s"), execute(), SYNC)
        assert kinds(got) == "12DCZ"
        assert got[2].body.endswith(b"2")


@pytest.mark.parametrize("mode", SHARED)
def test_an_error_before_a_replayed_parse_loses_no_statement(
    tenant: Organization, mode: PoolMode
) -> None:
    """A statement that the next server lacks is sent inside a batch that fails."""
    with Wire(tenant.dsn(str(mode))) as first, tenant.connect(str(mode)) as other:
        first.ask(parse("SELECT 7", "s"), SYNC)
        with other.transaction():  # takes the server that has the statement
            other.execute("SELECT 1")
            failing = parse("SELECT 1/0") + bind() + execute()
            use = bind((), "s") + execute()
            first.send(failing + use + SYNC + use + SYNC)
            answers = first.until("ZZ")
        assert kinds(answers) in ("12EZ2DCZ", "1EZ2DCZ")
        assert kinds(first.ask(use, SYNC)) == "2DCZ"


@pytest.mark.parametrize(
    "request_",
    [
        parse("SELEC 1") + query("SELECT 2") + SYNC,
        parse("SELECT 1", "s") + close_statement("s") + SYNC,
        SYNC,
        FLUSH + SYNC,
        parse("SELECT 1/0") + bind() + execute() + SYNC,
    ],
)
def test_a_server_is_given_back_after(tenant: Organization, request_: bytes) -> None:
    clients = [Wire(tenant.dsn("transaction")) for _ in range(MAX_SERVERS + 1)]
    try:
        for wire in clients:
            wire.ask(request_)
        assert kinds(clients[0].ask(query("SELECT 1"))) == "TDCZ"
    finally:
        for wire in clients:
            wire.sock.close()


@pytest.mark.parametrize("mode", [PoolMode.SESSION, *SHARED])
def test_a_client_that_waits_too_long_is_told_and_may_go_on(
    hasty: Organization, mode: PoolMode
) -> None:
    holders = [Wire(hasty.dsn(str(mode))) for _ in range(MAX_SERVERS)]
    late = Wire(hasty.dsn(str(mode)))
    try:
        for wire in holders:
            wire.ask(query("BEGIN"))
        for request_ in (
            query("SELECT 1"),
            parse("SELECT 1") + bind() + execute() + SYNC,
        ):
            started = time.monotonic()
            answer = late.ask(request_)
            waited = time.monotonic() - started
            assert kinds(answer) == "EZ"
            fields = answer[0].fields()
            assert (fields["S"], fields["C"]) == ("ERROR", "53300")
            assert "no server connection free after" in fields["M"]
            assert QUEUE_TIMEOUT <= waited < QUEUE_TIMEOUT + 5
        for wire in holders:
            wire.ask(query("COMMIT"))
        holders.pop().sock.close()
        assert kinds(late.ask(query("SELECT 1"))) == "TDCZ"
    finally:
        for wire in (*holders, late):
            wire.sock.close()


def test_who_waits_is_served_in_the_order_of_arrival(tenant: Organization) -> None:
    holders = [Wire(tenant.dsn("transaction")) for _ in range(MAX_SERVERS)]
    waiters = [Wire(tenant.dsn("transaction")) for _ in range(4)]
    insert = "INSERT INTO turn (who) VALUES (%d)"
    with psycopg.connect(tenant.direct_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE turn (id serial, who int)")
        for wire in holders:
            wire.ask(query("BEGIN"))
        for number, wire in enumerate(waiters):
            wire.send(query(insert % number))
            wait_for_waiters(tenant.proxy, number + 1)
        holders[0].ask(query("COMMIT"))
        for wire in waiters:
            assert kinds(wire.until("Z")) == "CZ"
        rows = connection.execute("SELECT who FROM turn ORDER BY id").fetchall()
    for wire in (*holders, *waiters):
        wire.sock.close()
    assert rows == [(0,), (1,), (2,), (3,)]


def metrics(proxy: Proxy) -> list[str]:
    with urllib.request.urlopen(proxy.admin_url("/metrics"), timeout=5) as answer:
        text: bytes = answer.read()
    return text.decode().splitlines()


def wait_for_waiters(proxy: Proxy, count: int) -> None:
    end = time.monotonic() + 10
    line = f"o7s_waiting_clients {count:.1f}"
    while line not in metrics(proxy):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_server_that_nobody_uses_is_closed(hasty: Organization) -> None:
    with hasty.connect("transaction") as connection:
        connection.execute("SELECT 1")
        wait_for_servers(hasty, 0)
        assert connection.execute("SELECT 1").fetchone() == (1,)
        wait_for_servers(hasty, 1)


def test_a_failed_query_gives_the_server_back(tenant: Organization) -> None:
    with tenant.connect("transaction") as first, tenant.connect("transaction") as other:
        for _ in range(10):
            with pytest.raises(errors.DivisionByZero):
                first.execute("SELECT 1/0")
            assert server_of(other) == server_of(first)


@pytest.mark.parametrize("mode", SHARED)
def test_a_statement_parsed_again_follows_a_changed_table(
    tenant: Organization, mode: PoolMode
) -> None:
    """A server's stale statement must not outlive the error that it causes."""
    use = bind((), "s") + execute()
    with (
        tenant.connect("session") as owner,
        Wire(tenant.dsn(str(mode))) as first,
        Wire(tenant.dsn(str(mode))) as second,
    ):
        owner.execute("CREATE TABLE shape AS SELECT 1 AS a")
        for wire in (first, second):
            wire.ask(parse("SELECT * FROM shape", "s"), use, SYNC)
        owner.execute("ALTER TABLE shape ADD COLUMN b int")
        got = first.ask(use, SYNC)
        assert [each.fields()["C"] for each in got if each.kind == "E"] == ["0A000"]
        first.ask(close_statement("s"), SYNC)
        assert kinds(first.ask(parse("SELECT * FROM shape", "s"), use, SYNC)) == "12DCZ"
        assert kinds(second.ask(close_statement("s"), SYNC)) == "3Z"
        got = second.ask(
            parse("SELECT * FROM shape", "t"), bind((), "t"), execute(), SYNC
        )
        assert kinds(got) == "12DCZ"


MIDNIGHT = "SELECT extract(epoch FROM '2026-01-01 00:00'::timestamptz)::bigint"
#: What it is in UTC and in Tokyo, nine hours earlier.
UTC, TOKYO = b"1767225600", b"1767193200"


def midnight(wire: Wire, name: str = "s") -> bytes:
    got = wire.ask(bind((), name), execute(), SYNC)
    return next(each.body[6:] for each in got if each.kind == "D")


@pytest.mark.parametrize("mode", SHARED)
def test_statements_are_not_shared_between_different_settings(
    tenant: Organization, mode: PoolMode
) -> None:
    """Literals are read by a Parse, in the time zone of whoever sends it."""
    with (
        Wire(tenant.dsn(str(mode)), {"TimeZone": "Asia/Tokyo"}) as tokyo,
        Wire(tenant.dsn(str(mode)), {"TimeZone": "UTC"}) as utc,
    ):
        for wire in (tokyo, utc):
            wire.ask(parse(MIDNIGHT, "s"), SYNC)
        for _ in range(2):
            assert midnight(tokyo) == TOKYO
            assert midnight(utc) == UTC


@pytest.mark.parametrize("mode", SHARED)
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        "SET LOCAL timezone = 'Asia/Tokyo'",
        "SELECT set_config('timezone', 'Asia/Tokyo', true)",
    ],
)
def test_a_statement_parsed_under_a_setting_is_not_shared(
    tenant: Organization, mode: PoolMode, setting: str, is_prepared: bool
) -> None:
    with (
        Wire(tenant.dsn(str(mode)), {"TimeZone": "UTC"}) as local,
        Wire(tenant.dsn(str(mode)), {"TimeZone": "UTC"}) as other,
    ):
        local.ask(query("BEGIN"))
        if is_prepared:
            local.ask(parse(setting), bind(), execute(), SYNC)
        else:
            local.ask(query(setting))
        local.ask(parse(MIDNIGHT, "s"), SYNC)
        assert midnight(local) == TOKYO
        local.ask(query("COMMIT"))
        other.ask(parse(MIDNIGHT, "s"), SYNC)
        assert midnight(other) == UTC
        local.ask(query("BEGIN"), query(setting))
        local.until("Z")
        local.ask(parse(MIDNIGHT, "t"), SYNC)
        assert midnight(local, "t") == TOKYO
        local.ask(query("COMMIT"))


def test_a_statement_parsed_behind_a_set_is_parsed_anew(tenant: Organization) -> None:
    with Wire(tenant.dsn("auto"), {"TimeZone": "UTC"}) as wire:
        wire.ask(parse(MIDNIGHT, "s"), SYNC)
        assert midnight(wire) == UTC
        wire.ask(query("SET timezone = 'Asia/Tokyo'"))
        wire.ask(parse(MIDNIGHT, "t"), SYNC)
        assert midnight(wire, "t") == TOKYO
        assert midnight(wire) == UTC
