"""Consoles over several workers: one answer for the machine, whoever is asked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy, create_operator
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey
from tests.fixtures.workers import Workers

TABLES = (
    "databases pools clients servers sockets active_sockets stats stats_totals "
    "stats_averages totals users lists config state version peers peer_pools dns_hosts "
    "dns_zones help"
).split()
VIEWS = "help whoami limits usage pins slow".split()
PLACES = (1, 2, 3)

Connection = psycopg.Connection[dict[str, Any]]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def three(
    postgres: Postgres, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """Three workers that these tests share."""
    shared = Workers(postgres, tmp_path_factory.mktemp("three"), valkey, 3)
    shared.start()
    try:
        yield shared
    finally:
        shared.stop()


@pytest.fixture
def tenant(three: Workers) -> Organization:
    return three.create_organization(limiter=LimiterMode.OFF)


@pytest.fixture
def clients(three: Workers, tenant: Organization) -> Iterator[list[Connection]]:
    """A client of the tenant in each worker."""
    clients = [three.connect(tenant, place) for place in PLACES]
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def consoles(three: Workers) -> Iterator[list[Connection]]:
    """A console in each worker."""
    consoles = [three.console(place) for place in PLACES]
    yield consoles
    for console in consoles:
        console.close()


def show(connection: Connection, what: str) -> list[Row]:
    return connection.execute(f"SHOW {what}".encode()).fetchall()


def of(tenant: Organization, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["tenant"] == tenant.handle]


def only(tenant: Organization, connection: Connection, table: str) -> Row:
    (row,) = of(tenant, show(connection, table))
    return row


def description(connection: Connection, what: str) -> list[tuple[str, int]]:
    described = connection.execute(f"SHOW {what}".encode()).description
    return [(each.name, each.type_code) for each in described or ()]


def do(connection: Connection, command: str) -> str | None:
    return connection.execute(command.encode()).statusmessage


# What operators see.


def test_columns_are_those_of_a_single_process(
    proxy: Proxy, consoles: list[Connection], clients: list[Connection]
) -> None:
    with psycopg.connect(create_operator(proxy)[0], autocommit=True) as single:
        for table in TABLES:
            expected = description(single, table)  # type: ignore[arg-type]
            assert expected
            assert [description(each, table) for each in consoles] == [expected] * 3


def test_every_worker_shows_the_same(
    consoles: list[Connection], clients: list[Connection]
) -> None:
    for client in clients:
        client.execute("SELECT 1")
    for table in ("databases", "stats_totals", "users", "lists", "state", "version"):
        shown = [sorted(map(repr, show(each, table))) for each in consoles]
        assert shown[0]
        assert shown[1:] == shown[:1] * 2, table


def test_stats_are_added_up(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    totals = {row["name"]: row["value"] for row in show(consoles[0], "totals")}
    for times, client in enumerate(clients, 1):
        for _ in range(10 * times):
            client.execute("SELECT 1")
    clients[2].execute("SELECT pg_sleep(0.1)")
    for console in consoles:
        row = only(tenant, console, "stats_totals")
        assert (row["query_count"], row["xact_count"]) == (61, 61)
        assert row["client_login_count"] >= 3
        assert row["query_time"] >= 100_000
        stats = only(tenant, console, "stats")
        assert stats["total_query_count"] == 61
        # Per query, whoever ran it; workers' rates begin when they do.
        mean = row["query_time"] // 61
        assert abs(stats["avg_query_time"] - mean) <= mean // 10
        assert only(tenant, console, "stats_averages")["query_time"] > 0
    after = {row["name"]: row["value"] for row in show(consoles[1], "totals")}
    assert after["total_query_count"] - totals["total_query_count"] == 61


def test_pools_databases_and_users_are_added_up(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    for client in clients[:2]:
        client.execute("BEGIN")
        client.execute("SELECT 1")
    clients[2].execute("SELECT 1")
    for console in consoles:
        pool = only(tenant, console, "pools")
        assert (pool["cl_active"], pool["cl_waiting"]) == (3, 0)
        assert (pool["sv_active"], pool["sv_idle"]) == (2, 1)
        database = only(tenant, console, "databases")
        assert database["current_connections"] == 3
        assert database["current_client_connections"] == 3
        assert database["max_client_connections"] == 200
        assert database["pool_size"] == 3 * 20
        assert (database["paused"], database["circuit"]) == (0, "closed")
        (user,) = (
            row for row in show(console, "users") if row["name"] == tenant.handle
        )
        assert user["current_connections"] == 3
        assert user["current_client_connections"] == 3
        assert user["max_user_client_connections"] == 200
    for client in clients:
        client.rollback()


def test_connections_are_listed_once_with_their_worker(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    for client in clients:
        client.execute("BEGIN")
        client.execute("SELECT 1")
    for console in consoles:
        rows = of(tenant, show(console, "clients"))
        assert sorted(row["worker"] for row in rows) == [1, 2, 3]
        ids = {each.info.backend_pid for each in clients}
        assert {row["id"] for row in rows} == ids
        servers = of(tenant, show(console, "servers"))
        assert sorted(row["worker"] for row in servers) == [1, 2, 3]
        assert {row["link"] for row in servers} == {row["ptr"] for row in rows}
        assert {row["link"] for row in rows} == {row["ptr"] for row in servers}
        sockets = of(tenant, show(console, "active_sockets"))
        assert len({row["ptr"] for row in sockets}) == len(sockets) == 6
        assert len({row["id"] for row in servers}) == 3


def test_lists_count_what_several_workers_have_once(
    consoles: list[Connection], clients: list[Connection]
) -> None:
    for console in consoles:
        items = {row["list"]: row["items"] for row in show(console, "lists")}
        assert items["databases"] == len(show(console, "databases"))
        assert items["users"] == len(show(console, "users"))
        assert items["used_clients"] == len(show(console, "clients"))
        assert items["used_servers"] == len(show(console, "servers"))
        assert items["login_clients"] == 0


def test_the_longest_wait_is_that_of_any_worker(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    do(consoles[0], f"PAUSE {name}")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(clients[0].execute, "SELECT 1")
        eventually(lambda: only(tenant, consoles[1], "pools")["cl_waiting"] == 1)
        eventually(lambda: only(tenant, consoles[1], "pools")["maxwait"] >= 1)
        second = threads.submit(clients[1].execute, "SELECT 1")
        eventually(lambda: only(tenant, consoles[2], "pools")["cl_waiting"] == 2)
        row = only(tenant, consoles[1], "pools")
        assert row["maxwait"] >= 1
        assert 0 <= row["maxwait_us"] < 1_000_000
        do(consoles[2], f"RESUME {name}")
        for waiting in (first, second):
            assert waiting.result(10).fetchone() == {"?column?": 1}


# What operators do.


def test_a_pause_is_for_all_workers_and_waits_for_all(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    for busy, (pausing, other) in ((0, (1, 2)), (2, (0, 1)), (1, (1, 0))):
        clients[busy].execute("BEGIN")
        clients[busy].execute("SELECT 1")
        with ThreadPoolExecutor(2) as threads:
            pause = threads.submit(do, consoles[pausing], f"PAUSE {name}")
            eventually(lambda: only(tenant, consoles[other], "databases")["paused"])  # noqa: B023
            idle = threads.submit(clients[(busy + 1) % 3].execute, "SELECT 1")
            eventually(lambda: only(tenant, consoles[other], "pools")["cl_waiting"])  # noqa: B023
            assert not pause.done()
            clients[busy].execute("COMMIT")
            assert pause.result(10) == "PAUSE"
            assert only(tenant, consoles[other], "pools")["sv_idle"] == 0
            for console in consoles:
                if console is not consoles[pausing]:
                    with pytest.raises(errors.ObjectNotInPrerequisiteState):
                        do(console, f"PAUSE {name}")
            assert not idle.done()
            assert do(consoles[other], f"RESUME {name}") == "RESUME"
            assert idle.result(10).fetchone() == {"?column?": 1}
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            do(consoles[pausing], f"RESUME {name}")


def test_a_kill_ends_the_clients_of_all_workers(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    assert do(consoles[1], f"KILL {name}") == "KILL"
    for client in clients:
        with pytest.raises(errors.AdminShutdown):
            client.execute("SELECT 1")
    for console in consoles:
        assert of(tenant, show(console, "clients")) == []
    assert only(tenant, consoles[0], "databases")["paused"] == 1
    do(consoles[2], f"RESUME {name}")


def test_a_client_is_killed_in_whichever_worker_it_is(
    consoles: list[Connection], clients: list[Connection]
) -> None:
    for client in clients[1:]:
        number = client.info.backend_pid
        assert do(consoles[0], f"KILL_CLIENT {number}") == "KILL_CLIENT"
        with pytest.raises(errors.AdminShutdown):
            client.execute("SELECT 1")
        with pytest.raises(errors.InvalidParameterValue):
            do(consoles[1], f"KILL_CLIENT {number}")
    assert clients[0].execute("SELECT 1").fetchone() == {"?column?": 1}


def test_a_disabled_database_refuses_newcomers_of_all_workers(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    assert do(consoles[0], f"DISABLE {name}") == "DISABLE"
    for _ in range(12):
        with pytest.raises(psycopg.OperationalError, match="does not accept"):
            tenant.connect("transaction")
    for client in clients:
        assert client.execute("SELECT 1").fetchone() == {"?column?": 1}
    assert only(tenant, consoles[2], "databases")["disabled"] == 1
    assert do(consoles[1], f"ENABLE {name}") == "ENABLE"
    for _ in range(6):
        tenant.connect("transaction").close()


def test_reconnect_and_wait_close_are_for_all_workers(
    consoles: list[Connection], clients: list[Connection], tenant: Organization
) -> None:
    name = f"{tenant.handle}/transaction"
    for client in clients:
        client.execute("BEGIN")
    before = [_server(client) for client in clients]
    assert do(consoles[0], f"RECONNECT {name}") == "RECONNECT"
    rows = of(tenant, show(consoles[1], "servers"))
    assert [row["close_needed"] for row in rows] == [1] * 3
    with ThreadPoolExecutor(1) as threads:
        closed = threads.submit(do, consoles[2], f"WAIT_CLOSE {name}")
        for client in clients:
            assert not closed.done()
            client.execute("COMMIT")
        assert closed.result(10) == "WAIT_CLOSE"
    assert not set(before) & {_server(client) for client in clients}


def _server(client: Connection) -> int:
    row = client.execute("SELECT pg_backend_pid() AS pid").fetchone()
    assert row is not None
    return int(row["pid"])


def test_a_database_is_found_by_its_name_in_whichever_worker_it_is(
    own_workers: Workers,
) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    with own_workers.console(1) as console, own_workers.connect(tenant, 2):
        assert do(console, "RECONNECT transaction") == "RECONNECT"
        with pytest.raises(errors.InvalidCatalogName):
            do(console, "RECONNECT auto")


# Workers that come, go and freeze.


def test_a_worker_that_comes_later_obeys_what_was_ordered(
    own_workers: Workers,
) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    first = own_workers.pids()
    with own_workers.console(1) as console:
        do(console, f"PAUSE {tenant.handle}/transaction")
        do(console, f"DISABLE {tenant.handle}/auto")
        killed = own_workers.signal(2, signal.SIGKILL)
        own_workers.wait_replaced(killed)
    own_workers.signal_supervisor(signal.SIGUSR1)
    own_workers.wait_replaced(*first.values())
    for _ in range(12):
        with pytest.raises(psycopg.OperationalError, match="does not accept"):
            tenant.connect("auto")
    with ThreadPoolExecutor(40) as threads, own_workers.console(1) as console:
        # To log in, a server has to be asked, and none is lent.
        coming = []
        while _visited(own_workers, tenant) != {1, 2}:
            assert len(coming) < 40
            coming.append(threads.submit(tenant.connect, "transaction"))
        with tenant.connect("session") as free:
            assert free.execute("SELECT 1").fetchone() == (1,)
        assert not any(each.done() for each in coming)
        do(console, f"RESUME {tenant.handle}/transaction")
        for each in coming:
            each.result(10).close()


def _visited(workers: Workers, tenant: Organization) -> set[int]:
    """The places that have a pool for the tenant's database."""
    return {
        worker["place"]
        for worker in workers.status()["workers"]
        for pool in worker.get("status", {"pools": ()})["pools"]
        if (pool["organisation"], pool["database"]) == (tenant.handle, "transaction")
    }


def test_a_frozen_worker_is_left_out_and_named(own_workers: Workers) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    name = f"{tenant.handle}/transaction"
    notices: list[str] = []
    with (
        own_workers.console(1) as console,
        own_workers.connect(tenant, 1) as here,
        own_workers.connect(tenant, 2) as there,
    ):
        for client in (here, there):
            client.add_notice_handler(lambda each: notices.append(str(each)))
            client.execute("SELECT 1")
        console.add_notice_handler(
            lambda each: notices.append(each.message_primary or "")
        )
        assert len(of(tenant, show(console, "clients"))) == 2
        assert not notices
        pid = own_workers.signal(2, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert len(of(tenant, show(console, "clients"))) == 1
            assert time.monotonic() - began < 3
            assert len(notices) == 1
            assert f"worker 2 (process {pid})" in notices[0]
            prepared = console.execute("SHOW POOLS", prepare=True).fetchall()
            assert of(tenant, prepared)[0]["cl_active"] == 1
            assert len(notices) == 2
            assert show(here, "o7s.usage")[0]["queries"] == 1
            assert len(notices) == 3
            began = time.monotonic()
            with pytest.raises(errors.SystemError, match="worker 2"):
                do(console, f"PAUSE {name}")
            assert time.monotonic() - began < 3
        finally:
            os.kill(pid, signal.SIGCONT)
        # It was told, and obeys as soon as it can.
        waiting = ThreadPoolExecutor(1)
        answer = waiting.submit(there.execute, "SELECT 1")
        eventually(lambda: only(tenant, console, "pools")["cl_waiting"] == 1)
        assert do(console, f"RESUME {name}") == "RESUME"
        assert answer.result(10).fetchone() == {"?column?": 1}
        waiting.shutdown()
    assert "Traceback" not in own_workers.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_pause_waits_for_no_worker_that_died_and_gives_one_up_that_froze(
    own_workers: Workers, number: signal.Signals
) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    name = f"{tenant.handle}/transaction"
    with (
        own_workers.console(1) as console,
        own_workers.console(1) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        busy = own_workers.connect(tenant, 2)
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        pause = threads.submit(do, console, f"PAUSE {name}")
        eventually(lambda: only(tenant, other, "databases")["paused"])
        assert not pause.done()
        pid = own_workers.signal(2, number)
        try:
            if number == signal.SIGKILL:
                assert pause.result(10) == "PAUSE"
            else:
                with pytest.raises(errors.SystemError, match=f"process {pid}"):
                    pause.result(10)
        finally:
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        busy.close()


@pytest.mark.parametrize("mode", ["WAIT_FOR_SERVERS", "WAIT_FOR_CLIENTS"])
def test_a_shutdown_waits_for_all_workers(own_workers: Workers, mode: str) -> None:
    own_workers.start()
    assert own_workers.process is not None
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    clients = [own_workers.connect(tenant, place) for place in (1, 2)]
    for client in clients:
        client.execute("BEGIN")
        client.execute("SELECT 1")
    with own_workers.console(1) as console:
        assert do(console, f"SHUTDOWN {mode}") == "SHUTDOWN"
    eventually(lambda: _is_refused(tenant))
    for client in clients:
        assert client.execute("SELECT 1").fetchone() == {"?column?": 1}
        client.execute("COMMIT")
        assert own_workers.process.poll() is None
        if mode == "WAIT_FOR_CLIENTS":
            assert client.execute("SELECT 1").fetchone() == {"?column?": 1}
        client.close()
    assert own_workers.process.wait(10) == 0
    log = own_workers.log.read_text()
    assert "replaced" not in log
    assert "Traceback" not in log


def _is_refused(tenant: Organization) -> bool:
    try:
        tenant.connect("transaction").close()
    except psycopg.OperationalError as error:
        return "refused" in str(error)
    return False


def test_a_reload_that_fails_is_told(own_workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "ogelproxy.toml"
    path.write_text("[pool]\nmax_servers = 7\n")
    own_workers.arguments += ["--config", str(path)]
    own_workers.start()

    def setting(console: Connection) -> str:
        rows = {row["key"]: row["value"] for row in show(console, "config")}
        return str(rows["pool.max_servers"])

    with own_workers.console(1) as one, own_workers.console(2) as other:
        path.write_text("[pool]\nmax_servers = 8\n")
        assert do(one, "RELOAD") == "RELOAD"
        assert setting(one) == setting(other) == "8"
        path.write_text("[pool]\nmax_servers = none\n")
        with pytest.raises(errors.ConfigFileError):
            do(other, "RELOAD")
        assert setting(one) == setting(other) == "8"


def test_a_worker_that_drains_is_told_of_and_commanded_too(
    own_workers: Workers,
) -> None:
    own_workers.settings["OGELPROXY_DRAIN_TIMEOUT"] = "60"
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    leaving = own_workers.connect(tenant, 1)
    leaving.execute("BEGIN")
    first = own_workers.pids()[1]
    own_workers.signal_supervisor(signal.SIGUSR1)
    # In its place is another one; it is there for its transaction only.
    eventually(lambda: own_workers.pids()[1] != first, timeout=30)
    with own_workers.console(1) as console:
        (row,) = of(tenant, show(console, "clients"))
        assert row["id"] == leaving.info.backend_pid
        assert do(console, f"KILL_CLIENT {row['id']}") == "KILL_CLIENT"
    with pytest.raises(errors.AdminShutdown):
        leaving.execute("SELECT 1")
    leaving.close()


# What tenants see.


def test_views_have_the_columns_of_a_single_process(
    proxy: Proxy, clients: list[Connection]
) -> None:
    single = proxy.create_organization(limiter=LimiterMode.OFF)
    with single.connect("transaction") as connection:
        for view in VIEWS:
            expected = description(connection, f"o7s.{view}")  # type: ignore[arg-type]
            assert expected
            told = [description(client, f"o7s.{view}") for client in clients]
            assert told == [expected] * 3


def test_usage_and_slow_are_of_all_workers(clients: list[Connection]) -> None:
    for times, client in enumerate(clients, 1):
        for _ in range(times):
            client.execute("SELECT generate_series(1, 10)")
    clients[1].execute("SELECT pg_sleep(0.01)")
    clients[2].execute("SELECT pg_sleep(0.1)")
    with pytest.raises(errors.DivisionByZero):
        clients[0].execute("SELECT 1 / 0")
    for client in clients:
        for prepare in (False, True):
            usage = client.execute("SHOW o7s.usage", prepare=prepare).fetchall()
            assert len(usage) == 1
            assert usage[0]["queries"] == 9
            assert (usage[0]["errors"], usage[0]["rows"]) == (1, 62)
            assert usage[0]["server_seconds"] > 0.11
        slow = show(client, "o7s.slow")
        assert (slow[0]["queries"], slow[0]["rows"]) == (2, 2)
        assert 0.1 <= slow[0]["longest_seconds"] < slow[0]["total_seconds"]
        assert slow[0]["mean_seconds"] == slow[0]["total_seconds"] / 2
        (failed,) = (row for row in slow if row["sqlstate"])
        assert (failed["errors"], failed["sqlstate"]) == (1, "22012")
        (series,) = (row for row in slow if row["queries"] == 6)
        assert series["rows"] == 60


def test_limits_are_of_all_workers(three: Workers) -> None:
    tenant = three.create_organization(tier="pro")
    clients = [three.connect(tenant, place) for place in PLACES]
    for client in clients:
        for _ in range(4):
            client.execute("SELECT 1")
    for client in clients:
        (row,) = show(client, "o7s.limits")
        assert row["admitted"] == 12
        assert (row["queries_per_second"], row["burst"]) == (200.0, 1000.0)
        assert 0 <= row["tokens"] <= 1000
        assert row["max_connections"] == 50
        assert row["connections"] == 3
    clients.pop().close()
    eventually(lambda: show(clients[0], "o7s.limits")[0]["connections"] == 2)
    for client in clients:
        client.close()


def test_pins_are_of_all_workers_and_of_one_tenant(
    three: Workers, tenant: Organization
) -> None:
    stranger = three.create_organization(limiter=LimiterMode.OFF)
    clients = [three.connect(tenant, place, "auto") for place in PLACES]
    for client in clients[1:]:
        client.execute("CREATE TEMPORARY TABLE kept (n int)")
    ids = {client.info.backend_pid for client in clients[1:]}
    eventually(
        lambda: {row["connection_id"] for row in show(clients[0], "o7s.pins")} == ids
    )
    with three.connect(stranger, 2, "auto") as other:
        assert show(other, "o7s.pins") == []
        assert show(other, "o7s.usage") == []
    for client in clients:
        client.close()


def test_a_view_in_a_pipeline_is_answered_in_its_turn(
    clients: list[Connection],
) -> None:
    client = clients[0]
    for _ in range(20):
        with client.pipeline():
            cursors = [
                client.execute(text)
                for text in ("SELECT 1 AS n", "SHOW o7s.whoami", "SHOW o7s.usage") * 3
            ]
            rows = [cursor.fetchone() for cursor in cursors]
        assert [row is not None for row in rows[::3]] == [True] * 3
        assert rows[1] == rows[4] == rows[7]
    with client.transaction():
        client.execute("SELECT 1")
        assert show(client, "o7s.usage")
        client.execute("SELECT 2")


def test_many_who_ask_at_once_are_all_answered(clients: list[Connection]) -> None:
    def ask(client: Connection) -> int:
        return sum(len(show(client, "o7s.limits")) for _ in range(100))

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, clients)) == [100] * 3


def test_a_client_that_leaves_while_others_are_asked_leaves_nothing(
    three: Workers, tenant: Organization, consoles: list[Connection]
) -> None:
    for _ in range(20):
        client = three.connect(tenant, 1)
        client.pgconn.send_query(b"SHOW o7s.usage")
        client.close()
    eventually(lambda: of(tenant, show(consoles[0], "clients")) == [])
    assert "Traceback" not in three.log.read_text()
