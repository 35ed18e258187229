"""The operators' console: what it tells, what it does, and to whom."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import errors
from psycopg.rows import dict_row

from ogelproxy.auth import apikey
from ogelproxy.tenants.model import OPERATORS, LimiterMode
from tests.fixtures.engine import (
    ACTOR,
    Organization,
    Proxy,
    can_connect,
    create_operator,
    free_port,
)
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import SYNC, Wire, bind, execute, kinds, parse, query

#: What prometheus-community/pgbouncer_exporter 0.11 asks, and the columns it reads.
EXPORTED = {
    "SHOW STATS": [],
    "SHOW VERSION;": ["version"],
    "SHOW LISTS;": ["list", "items"],
    "SHOW CONFIG;": ["key", "value", "default", "changeable"],
    "SHOW CLIENTS;": ["user", "database", "application_name", "state"],
    "SHOW databases;": (
        "name host port database force_user pool_size reserve_pool_size pool_mode "
        "max_connections current_connections paused disabled"
    ).split(),
    "SHOW stats_totals;": (
        "database query_count query_time bytes_received bytes_sent wait_time "
        "xact_count xact_time client_parse_count server_parse_count bind_count "
        "server_assignment_count"
    ).split(),
    "SHOW pools;": (
        "database user cl_active cl_active_cancel_req cl_waiting cl_waiting_cancel_req "
        "sv_active sv_active_cancel sv_being_canceled sv_idle sv_used sv_tested "
        "sv_login maxwait"
    ).split(),
}
TABLES = (
    "databases pools clients servers sockets active_sockets stats stats_totals "
    "stats_averages totals users lists config state version peers peer_pools dns_hosts "
    "dns_zones help"
).split()
#: PgBouncer 1.18 named it otherwise.
RENAMED = {"reserve_pool": "reserve_pool_size"}
PID = "SELECT pg_backend_pid()"


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Console:
    """A console on one connection."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)

    def do(self, command: str) -> str | None:
        return self.connection.execute(command.encode()).statusmessage

    def show(self, table: str) -> list[dict[str, Any]]:
        return self.connection.execute(f"SHOW {table}".encode()).fetchall()

    def of(self, tenant: Organization, table: str, mode: str = "transaction") -> Any:
        """The row of a tenant's database."""
        key = "name" if table == "databases" else "database"
        rows = [
            row for row in self.show(table) if row[key] == f"{tenant.handle}/{mode}"
        ]
        assert len(rows) == 1
        return rows[0]


@pytest.fixture(scope="module")
def url(proxy: Proxy) -> str:
    return create_operator(proxy)[0]


@pytest.fixture
def console(url: str) -> Iterator[Console]:
    console = Console(url)
    yield console
    console.connection.close()


@pytest.fixture
def tenant(proxy: Proxy) -> Organization:
    return proxy.create_organization(limiter=LimiterMode.OFF)


def value(connection: psycopg.Connection[Any], statement: str) -> Any:
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


# Who may come in.


def test_a_wrong_key_fails_as_that_of_an_unknown_organisation(proxy: Proxy) -> None:
    wrong = apikey.generate()
    refused = proxy.refusal(OPERATORS, wrong, OPERATORS)
    assert refused == proxy.refusal("org_nobody", wrong, OPERATORS)
    assert refused["C"] == "28P01"


def test_a_token_opens_no_console(proxy: Proxy, url: str) -> None:
    refused = proxy.refusal(f"{OPERATORS}.jwt", "x.y.z", OPERATORS)
    assert refused["C"] == "28P01"
    refused = proxy.refusal(OPERATORS, "x.y.z", OPERATORS, options="-c ogel.auth=jwt")
    assert refused["C"] == "28P01"


def test_the_console_is_for_operators_and_operators_are_for_the_console(
    proxy: Proxy, tenant: Organization, url: str
) -> None:
    refused = proxy.refusal(tenant.handle, tenant.key, OPERATORS)
    assert refused["C"] == "3D000"
    key = url.split(":")[2].split("@")[0]
    assert proxy.refusal(OPERATORS, key, "app")["C"] == "3D000"
    # As a program made for PgBouncer names it.
    with psycopg.connect(proxy.dsn(OPERATORS, key, "pgbouncer")) as connection:
        assert value(connection, "SHOW VERSION").startswith("ogelproxy ")


def test_a_revoked_key_ends_its_consoles_and_no_other(
    proxy: Proxy, console: Console
) -> None:
    other, key_id = create_operator(proxy, "leaving")
    leaving = Console(other)
    leaving.show("version")
    proxy.operate(lambda store: store.revoke_operator_key(key_id, actor=ACTOR))

    def is_ended() -> bool:
        try:
            leaving.show("version")
        except psycopg.OperationalError as error:
            assert error.sqlstate in ("28P01", None)
            return True
        return False

    until(is_ended)
    with pytest.raises(psycopg.OperationalError, match="password authentication"):
        Console(other)
    assert console.show("version")


def test_a_console_is_no_client(proxy: Proxy, console: Console) -> None:
    before = console.show("lists")
    more = Console(console.url)
    assert console.show("lists") == before
    assert all(row["user"] != OPERATORS for row in console.show("clients"))
    assert not any(OPERATORS in row["database"] for row in console.show("stats"))
    more.connection.close()


# What it tells.


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_the_same_in_every_protocol_and_format(
    console: Console, tenant: Organization, name: str
) -> None:
    with tenant.connect("transaction") as connection, connection.transaction():
        connection.execute("SELECT 1")
        shown = console.show(name)
        for options in ({"prepare": True}, {"prepare": True, "binary": True}):
            rows = console.connection.execute(f"SHOW {name}", **options).fetchall()  # type: ignore[arg-type]
            assert [list(row) for row in rows] == [list(row) for row in shown]
            assert len(rows) == len(shown)


async def test_asyncpg_reads_every_table(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for name in TABLES:
            for _ in range(2):
                await connection.fetch(f"SHOW {name}")
        assert await connection.fetchval("SELECT 1") == 1
        assert await connection.execute("SHOW VERSION") == "SHOW"
        await connection.reset()
    finally:
        await connection.close()


def test_psql_reads_tables_and_gets_a_hint(url: str) -> None:
    done = subprocess.run(
        ["psql", url, "-XAt", "-c", "show version;", "-c", "shwo pools"],
        capture_output=True,
        text=True,
        env={**os.environ, "PGCONNECT_TIMEOUT": "5"},
    )
    assert done.stdout.startswith("ogelproxy ")
    assert "unknown command: SHWO pools" in done.stderr
    assert "SHOW HELP" in done.stderr


def test_the_exporter_finds_its_columns_with_numbers_in_them(
    console: Console, tenant: Organization
) -> None:
    labels = {"name", "host", "database", "force_user", "pool_mode", "user"}
    with tenant.connect("transaction"):
        for statement, columns in EXPORTED.items():
            rows = console.connection.execute(statement.encode()).fetchall()
            assert rows
            assert set(columns) <= rows[0].keys()
            if statement.split()[1].islower():
                for column in set(columns) - labels:
                    assert float(rows[0][column]) >= 0
    config = {row["key"]: row["value"] for row in console.show("config")}
    assert float(config["max_client_conn"]) == 20_000
    assert all(float(row["items"]) >= 0 for row in console.show("lists"))


@pytest.fixture(scope="module")
def bouncer() -> Iterator[psycopg.Connection[Any]]:
    """The console of a PgBouncer."""
    binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.skip("no pgbouncer here to compare with")
    with tempfile.TemporaryDirectory(prefix="o7s-") as name:
        directory, port = Path(name), free_port()
        directory.chmod(0o755)
        (directory / "users.txt").write_text('"admin" ""\n')
        (directory / "pgbouncer.ini").write_text(
            "[databases]\napp = host=127.0.0.1 port=1\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {directory}/users.txt\n"
            "admin_users = admin\n"
        )
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [binary, "-q", *user, str(directory / "pgbouncer.ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            connections: list[psycopg.Connection[Any]] = []

            def connect() -> bool:
                assert process.poll() is None
                try:
                    connections.append(
                        psycopg.connect(
                            f"postgresql://admin@127.0.0.1:{port}/pgbouncer",
                            autocommit=True,
                        )
                    )
                except psycopg.OperationalError:
                    return False
                return True

            until(connect)
            yield connections[0]
            connections[0].close()
        finally:
            process.terminate()
            process.wait()


@pytest.mark.parametrize(
    "name",
    "databases pools clients servers sockets active_sockets stats stats_totals "
    "stats_averages totals users lists config version dns_hosts dns_zones".split(),
)
def test_columns_of_a_pgbouncer_are_ours_in_its_order_and_types(
    bouncer: psycopg.Connection[Any], console: Console, name: str
) -> None:
    theirs = bouncer.execute(f"SHOW {name}".encode()).description or []
    ours = console.connection.execute(f"SHOW {name}".encode()).description or []
    wanted = [(RENAMED.get(each.name, each.name), each.type_code) for each in theirs]
    have = iter([(each.name, each.type_code) for each in ours])
    assert all(each in have for each in wanted), (wanted, ours)


def test_lists_and_totals_name_what_a_pgbouncer_names(
    bouncer: psycopg.Connection[Any], console: Console
) -> None:
    theirs = [row[0] for row in bouncer.execute("SHOW LISTS").fetchall()]
    ours = iter(row["list"] for row in console.show("lists"))
    assert all(each in ours for each in theirs)


def test_stats_count_what_a_tenant_did(console: Console, tenant: Organization) -> None:
    with tenant.connect("transaction") as connection:
        for _ in range(3):
            connection.execute("SELECT 1")
        with connection.transaction():
            connection.execute("SELECT pg_sleep(0.05)")
        connection.execute("SELECT 2", prepare=True)
        row = console.of(tenant, "stats_totals")
    # The transaction is BEGIN, one query and COMMIT; preparing is one of its own.
    assert (row["xact_count"], row["query_count"]) == (6, 7)
    assert row["server_assignment_count"] == 6
    assert row["client_login_count"] == 1
    assert row["bytes_received"] > 0 < row["bytes_sent"]
    assert row["xact_time"] >= row["query_time"] >= 50_000
    assert (row["client_parse_count"], row["bind_count"]) == (1, 1)
    assert (row["tenant"], row["tier"]) == (tenant.handle, "enterprise")
    stats = console.of(tenant, "stats")
    assert stats["total_query_count"] == 7
    assert stats["avg_xact_time"] == row["xact_time"] // 6
    totals = {row["name"]: row["value"] for row in console.show("totals")}
    assert totals["total_query_count"] >= 7


def test_clients_and_servers_are_linked(console: Console, tenant: Organization) -> None:
    with tenant.connect("transaction", application_name="jobs") as connection:
        with connection.transaction():
            pid = value(connection, PID)
            (client,) = (
                row for row in console.show("clients") if row["tenant"] == tenant.handle
            )
            (server,) = (
                row for row in console.show("servers") if row["tenant"] == tenant.handle
            )
            assert client["id"] == connection.info.backend_pid
            assert (client["state"], server["state"]) == ("active", "active")
            assert client["link"] == server["ptr"]
            assert server["link"] == client["ptr"]
            assert server["remote_pid"] == pid
            assert client["application_name"] == server["application_name"] == "jobs"
            assert client["addr"] == "127.0.0.1"
            assert client["local_port"] == tenant.proxy.port
            pool = console.of(tenant, "pools")
            assert (pool["cl_active"], pool["sv_active"], pool["sv_idle"]) == (1, 1, 0)
        pool = console.of(tenant, "pools")
        assert (pool["cl_active"], pool["sv_active"], pool["sv_idle"]) == (1, 0, 1)
        assert (pool["pool_mode"], pool["user"]) == ("transaction", tenant.handle)


def test_no_secret_is_shown(console: Console, proxy: Proxy) -> None:
    text = repr([console.show(name) for name in TABLES])
    for secret in (proxy.secret_key, proxy.postgres.dsn(proxy.control)):
        assert secret not in text


# Its protocol.


def test_statements_of_one_message_are_answered_in_turn(url: str) -> None:
    with Wire(url) as wire:
        got = wire.ask(query("SHOW VERSION; ; SELECT 1; SHWO; SHOW VERSION"))
        assert kinds(got) == "TDCTDCEZ"
        assert got[-2].fields()["C"] == "42601"
        assert kinds(wire.ask(query(" ; -- nothing"))) == "IZ"
        assert kinds(wire.ask(query('SHOW "VERSION'))) == "EZ"


def test_a_failed_batch_is_skipped_up_to_its_sync(url: str) -> None:
    with Wire(url) as wire:
        show = parse("SHOW LISTS"), bind(), execute(max_rows=3), execute(max_rows=2)
        assert kinds(wire.ask(*show, SYNC)) == "12DDDsDDsZ"
        assert kinds(wire.ask(parse("SHWO"), *show, SYNC)) == "EZ"
        assert kinds(wire.ask(bind(name="none"), *show, SYNC)) == "EZ"
        got = wire.ask(parse("SHOW LISTS; SHOW LISTS"), SYNC)
        assert got[0].fields()["C"] == "42601"
        assert kinds(wire.ask(parse(""), bind(), execute(), SYNC)) == "12IZ"


def test_a_driver_may_put_a_transaction_around_it(url: str) -> None:
    with psycopg.connect(url) as connection:  # not in autocommit
        assert value(connection, "SHOW VERSION")
        assert connection.info.transaction_status.name == "INTRANS"
        connection.commit()
        assert connection.info.transaction_status.name == "IDLE"
        connection.execute("SET timezone = 'UTC'")
        with pytest.raises(errors.FeatureNotSupported, match="RELOAD"):
            connection.execute("SET pool.max_servers = 3")
        connection.execute("DISCARD ALL")


def test_a_message_that_is_none_ends_the_console_only(
    url: str, console: Console
) -> None:
    with Wire(url) as wire:
        wire.send(b"B\0\0\0\x05x")
        last = wire.rest()[-1]
        assert last.fields()["C"] == "08P01"
    assert console.show("version")


def test_consoles_are_bounded(own_proxy: Proxy) -> None:
    own_proxy.start()
    url, _ = create_operator(own_proxy)
    wires = [Wire(url) for _ in range(100)]
    try:
        with pytest.raises(ConnectionRefusedError) as caught:
            Wire(url)
        assert caught.value.args[0]["C"] == "53300"
    finally:
        for wire in wires:
            wire.sock.close()
    until(lambda: can_connect(url))


# What it does.


def test_pause_waits_for_transactions_and_resume_lets_queries_go_on(
    console: Console, tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    other = Console(console.url)
    with (
        tenant.connect("transaction") as busy,
        tenant.connect("transaction") as waiting,
        ThreadPoolExecutor(2) as threads,
    ):
        busy.execute("BEGIN")
        before = value(busy, PID)
        pause = threads.submit(other.do, f'PAUSE "{name}"')
        until(lambda: console.of(tenant, "databases")["paused"] == 1)
        blocked = threads.submit(value, waiting, PID)
        until(lambda: console.of(tenant, "pools")["cl_waiting"] == 1)
        assert not pause.done()
        assert value(busy, PID) == before  # its transaction goes on
        busy.execute("COMMIT")
        assert pause.result(timeout=10) == "PAUSE"
        assert console.of(tenant, "databases")["current_connections"] == 0
        assert not blocked.done()
        # Another database of the same organisation isn't paused.
        with tenant.connect("auto") as free:
            assert value(free, "SELECT 1") == 1
        assert console.do(f"RESUME {name}") == "RESUME"
        assert blocked.result(timeout=10) != before
    other.connection.close()


def test_pause_of_all_holds_newcomers_until_resume(own_proxy: Proxy) -> None:
    own_proxy.start()
    console = Console(create_operator(own_proxy)[0])
    one, other = (
        own_proxy.create_organization(limiter=LimiterMode.OFF) for _ in range(2)
    )
    with one.connect("transaction") as client, ThreadPoolExecutor(2) as threads:
        value(client, PID)
        assert console.do("PAUSE") == "PAUSE"
        assert {row["key"]: row["value"] for row in console.show("state")} == {
            "active": "no",
            "paused": "yes",
            "suspended": "no",
        }
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            console.do("PAUSE")
        asked = threads.submit(value, client, PID)
        # A database nobody has been to yet: its login asks a server for settings.
        entered = threads.submit(other.connect, "transaction")
        until(lambda: console.of(one, "pools")["cl_waiting"] == 1)
        until(lambda: len(console.show("pools")) == 2)
        assert not asked.done()
        assert not entered.done()
        assert console.do("RESUME") == "RESUME"
        assert asked.result(timeout=10)
        entered.result(timeout=10).close()
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            console.do("RESUME")
    console.connection.close()


def test_an_operator_who_leaves_leaves_the_pause(
    console: Console, tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    with tenant.connect("transaction") as busy:
        busy.execute("BEGIN")
        value(busy, PID)
        with Wire(console.url) as wire:
            wire.send(query(f"PAUSE {name}"))
            until(lambda: console.of(tenant, "databases")["paused"] == 1)
        busy.execute("COMMIT")
        console.do(f"RESUME {name}")
        assert value(busy, "SELECT 1") == 1


def test_reconnect_replaces_servers_when_they_are_given_back(
    console: Console, tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    other = Console(console.url)
    with tenant.connect("transaction") as client, ThreadPoolExecutor(1) as threads:
        client.execute("BEGIN")
        before = value(client, PID)
        assert console.do(f"RECONNECT {name}") == "RECONNECT"
        (server,) = (
            row for row in console.show("servers") if row["tenant"] == tenant.handle
        )
        assert server["close_needed"] == 1
        closed = threads.submit(other.do, f"WAIT_CLOSE {name}")
        assert value(client, PID) == before
        assert not closed.done()
        client.execute("COMMIT")
        assert closed.result(timeout=10) == "WAIT_CLOSE"
        assert value(client, PID) != before
    other.connection.close()


def test_kill_ends_clients_and_servers_and_pauses(
    console: Console, tenant: Organization, postgres: Postgres
) -> None:
    name = f"{tenant.handle}/transaction"
    with tenant.connect("transaction") as client, tenant.connect("auto") as spared:
        client.execute("BEGIN")
        pid = value(client, PID)
        assert console.do(f"KILL {name}") == "KILL"
        with pytest.raises(errors.AdminShutdown):
            client.execute("SELECT 1")
        with psycopg.connect(postgres.dsn(), autocommit=True) as direct:
            query_pid = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
            until(lambda: value(direct, query_pid) == 0)
        assert value(spared, "SELECT 1") == 1
        assert console.of(tenant, "databases")["paused"] == 1
        console.do(f"RESUME {name}")
    with tenant.connect("transaction") as client:
        assert value(client, "SELECT 1") == 1


def test_kill_client_ends_one(console: Console, tenant: Organization) -> None:
    with tenant.connect("auto") as one, tenant.connect("auto") as other:
        gone = one.info.backend_pid
        assert console.do(f"KILL_CLIENT {one.info.backend_pid}") == "KILL_CLIENT"
        with pytest.raises(errors.AdminShutdown):
            one.execute("SELECT 1")
        assert value(other, "SELECT 1") == 1
    with pytest.raises(errors.InvalidParameterValue):
        console.do(f"KILL_CLIENT {gone}")
    with pytest.raises(errors.InvalidParameterValue):
        console.do("KILL_CLIENT all")


def test_disable_refuses_newcomers_only(console: Console, tenant: Organization) -> None:
    name = f"{tenant.handle}/auto"
    with tenant.connect("auto") as client:
        assert console.do(f"DISABLE {name}") == "DISABLE"
        assert console.of(tenant, "databases", "auto")["disabled"] == 1
        refused = tenant.proxy.refusal(tenant.handle, tenant.key, "auto")
        assert refused["C"] == "57P03"
        assert value(client, "SELECT 1") == 1
        assert console.do(f"ENABLE {name}") == "ENABLE"
        tenant.connect("auto").close()
    with pytest.raises(errors.SyntaxError, match="required"):
        console.do("DISABLE")


def test_a_database_is_found_by_its_name_where_that_is_enough(
    own_proxy: Proxy,
) -> None:
    own_proxy.start()
    console = Console(create_operator(own_proxy)[0])
    one, other = (own_proxy.create_organization() for _ in range(2))
    with pytest.raises(errors.InvalidCatalogName):
        console.do("RECONNECT auto")
    with one.connect("auto"):
        assert console.do("RECONNECT auto") == "RECONNECT"
        with other.connect("auto"):
            with pytest.raises(errors.AmbiguousFunction, match=one.handle):
                console.do("RECONNECT auto")
    for name in ("org_nobody/auto", f"{one.handle}/none", "nonsense/auto"):
        with pytest.raises(errors.InvalidCatalogName):
            console.do(f"RECONNECT {name}")
    # Before anybody connected to it.
    assert console.do(f"PAUSE {other.handle}/session") == "PAUSE"
    assert console.of(other, "databases", "session")["paused"] == 1
    console.connection.close()


def test_reload_reads_the_file_again(own_proxy: Proxy) -> None:
    path = own_proxy.directory / "ogelproxy.toml"
    path.write_text("[pool]\nmax_servers = 7\n")
    own_proxy.arguments = ["--config", str(path)]
    own_proxy.start()
    console = Console(create_operator(own_proxy)[0])

    def setting() -> str:
        rows = {row["key"]: row["value"] for row in console.show("config")}
        assert rows["default_pool_size"] == rows["pool.max_servers"]
        return str(rows["pool.max_servers"])

    assert setting() == "7"
    path.write_text("[pool]\nmax_servers = 8\n")
    assert console.do("RELOAD") == "RELOAD"
    assert setting() == "8"
    path.write_text("[pool]\nmax_servers = none\n")
    with pytest.raises(errors.ConfigFileError):
        console.do("RELOAD")
    assert setting() == "8"
    console.connection.close()


@pytest.mark.parametrize("mode", ["", "WAIT_FOR_SERVERS", "WAIT_FOR_CLIENTS"])
def test_shutdown_ends_the_process_when_it_may(own_proxy: Proxy, mode: str) -> None:
    own_proxy.start()
    console = Console(create_operator(own_proxy)[0])
    tenant = own_proxy.create_organization(limiter=LimiterMode.OFF)
    client = tenant.connect("transaction")
    client.execute("BEGIN")
    client.execute("SELECT 1")
    assert console.do(f"SHUTDOWN {mode}") == "SHUTDOWN"
    assert own_proxy.process is not None
    if mode:
        with pytest.raises(ConnectionRefusedError):
            Wire(tenant.dsn("transaction")).sock.close()
        assert value(client, "SELECT 1") == 1
        client.execute("COMMIT")
        if mode == "WAIT_FOR_CLIENTS":
            assert value(client, "SELECT 1") == 1
            assert own_proxy.process.poll() is None
    else:
        with pytest.raises(errors.AdminShutdown):
            client.execute("SELECT 1")
    client.close()
    assert own_proxy.process.wait(timeout=10) == 0


def test_an_unknown_shutdown_does_nothing(console: Console) -> None:
    with pytest.raises(errors.SyntaxError):
        console.do("SHUTDOWN NOW")
    with pytest.raises(errors.SyntaxError):
        console.do("SHUTDOWN WAIT_FOR_CLIENTS please")
    assert console.show("version")


async def test_a_key_is_noted_as_used(proxy: Proxy) -> None:
    _, key_id = await asyncio.to_thread(create_operator, proxy, "noted")
    async with proxy.store() as store:
        at = (await store.list_operator_keys())[-1].created_at
        await store.record_key_uses({key_id: at})
        keys = {key.id: key.last_used_at for key in await store.list_operator_keys()}
        assert keys[key_id] == at
