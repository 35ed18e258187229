"""Databases that go away as a whole, come back, freeze or are full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from ogelproxy.config import Secret
from ogelproxy.embedded import EmbeddedPostgres
from ogelproxy.errors import EmbeddedFailed
from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import (
    RawClient,
    add_databases,
    eventually,
    kinds,
    samples,
    status,
)
from tests.fixtures.postgres import Postgres

MODES = [PoolMode.SESSION, PoolMode.TRANSACTION, PoolMode.AUTO]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)

OPEN = 'o7s_circuit_open{database_type="postgres"}'


@pytest.fixture(scope="module")
def brisk(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy that waits for servers for a second, and says so after half of it."""
    settings = {
        "OGELPROXY_POOL_CONNECT_TIMEOUT": "1",
        "OGELPROXY_POOL_QUEUE_TIMEOUT": "5",
        "OGELPROXY_POOL_NOTICE_AFTER": "0.5",
        "OGELPROXY_POOL_SERVER_IDLE_TIMEOUT": "1",
        "OGELPROXY_POOL_MAX_SERVERS": "2",
    }
    proxy = Proxy(postgres, tmp_path_factory.mktemp("targets"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def mortal() -> Iterator[EmbeddedPostgres]:
    """A Postgres that only the tests of this file use."""
    with tempfile.TemporaryDirectory(prefix="o7s-") as directory:
        target = EmbeddedPostgres(
            Path(directory) / "pg",
            password=Secret(secrets.token_urlsafe(18)),
            settings={"fsync": "off"},
            trusts_socket=True,
        )
        try:
            asyncio.run(target.start())
        except EmbeddedFailed as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        try:
            yield target
        finally:
            asyncio.run(target.stop())


@pytest.fixture
def target(mortal: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """A Postgres to end at will: for the next test it runs again."""
    yield mortal
    if mortal.pid is None:
        asyncio.run(mortal.stop())
        asyncio.run(mortal.start())


@pytest.fixture
def tenant(brisk: Proxy) -> Organization:
    """An organisation of the test's own, whose servers can be counted."""
    return brisk.create_organization(limiter=LimiterMode.OFF)


def route(
    tenant: Organization,
    target: EmbeddedPostgres,
    mode: PoolMode = PoolMode.TRANSACTION,
    **login: str,
) -> str:
    """Give the organisation a database on `target`; return its name."""
    password = Secret(login["password"]) if "password" in login else None
    dsn = target.dsn(user=login.get("user", "postgres"), password=password)
    return asyncio.run(add_databases(tenant, [dsn], mode))[0]


def circuits(tenant: Organization) -> set[str]:
    """The states of the circuits of an organisation's pools."""
    url = tenant.proxy.admin_url("/status")
    with urllib.request.urlopen(url, timeout=5) as answer:
        pools = json.load(answer)["pools"]
    return {pool["circuit"] for pool in pools if pool["organisation"] == tenant.handle}


def works(client: psycopg.Connection) -> bool:
    """Try a query; the connection must live, whatever the answer."""
    try:
        return client.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError as error:
        assert error.sqlstate == "08006", error
        assert not client.closed
        return False


def connects(tenant: Organization, name: str) -> bool:
    try:
        with tenant.connect(name) as client:
            return works(client)
    except psycopg.OperationalError:
        return False


@contextlib.contextmanager
def stopped(target: EmbeddedPostgres) -> Iterator[None]:
    """Within it, the target is down."""
    asyncio.run(target.stop())
    try:
        yield
    finally:
        asyncio.run(target.start())


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Within it, a process neither answers nor ends, like a host cut off."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# The circuit.


def test_clients_of_a_target_that_is_down_are_refused_at_once_till_it_is_back(
    brisk: Proxy, tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    before = brisk.log.stat().st_size
    with RawClient.logged_in(tenant, name) as client:
        with stopped(target):
            eventually(lambda: status(tenant)["servers"] == 0)
            fields = open_circuit(client)
            assert (fields["S"], fields["C"]) == ("ERROR", "08006")
            assert fields["M"] == "the database can't be reached"
            assert fields["H"].startswith("retry after ")
            assert samples(brisk)[OPEN] >= 1
        eventually(lambda: kinds(client.query("SELECT 1")) == "TDCZ", timeout=20)
    assert circuits(tenant) == {"closed"}
    with tenant.connect(name) as after:
        assert works(after)
    written = brisk.log.read_bytes()[before:].decode()
    assert written.count("circuit opened") == 1
    assert written.count("circuit closed") == 1
    assert "Traceback" not in written


def open_circuit(client: RawClient) -> dict[str, str]:
    """Query until the refusal names the time of the next attempt; return it."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        answer = client.query("SELECT 1")
        assert (kinds(answer[-2:]), answer[-1][1]) == ("EZ", b"I")
        fields = messages.read_fields(answer[-2][1])
        if "H" in fields:
            return fields
    raise AssertionError("the circuit did not open")


def test_an_open_circuit_refuses_new_connections_too(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with RawClient.logged_in(tenant, name) as client, stopped(target):
        eventually(lambda: status(tenant)["servers"] == 0)
        open_circuit(client)
        with RawClient(tenant.proxy) as late:
            late.start(tenant.handle, name)
            late.authenticate(tenant.key)
            fields = late.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "08006")
    eventually(lambda: connects(tenant, name), timeout=20)


def test_a_batch_is_refused_by_an_open_circuit_up_to_its_sync(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    batch = b"".join(
        (
            messages.message(b"P", b"\0SELECT 1\0\0\0"),
            messages.message(b"B", bytes(8)),
            messages.message(b"E", bytes(5)),
            messages.message(b"S", b""),
        )
    )
    with RawClient.logged_in(tenant, name) as client:
        with stopped(target):
            eventually(lambda: status(tenant)["servers"] == 0)
            open_circuit(client)
            client.send(batch * 3)
            told = [client.until(b"Z") for _ in range(3)]
            assert [kinds(answer) for answer in told] == ["EZ"] * 3
        client.send(batch)
        answer = client.until(b"Z")
        while kinds(answer) == "EZ":
            client.send(batch)
            answer = client.until(b"Z")
        assert kinds(answer) == "12DCZ"


def test_a_target_cut_off_costs_one_client_the_time_of_a_probe(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    assert target.pid is not None
    with (
        RawClient.logged_in(tenant, name) as probing,
        RawClient.logged_in(tenant, name) as refused,
    ):
        eventually(lambda: status(tenant)["servers"] == 0)
        with frozen(target.pid):
            open_circuit(refused)
            eventually(lambda: probes(probing, tenant))
            # While one waits for the probe, the other is told at once.
            answer = refused.query("SELECT 1")
            assert circuits(tenant) == {"half-open"}
            assert messages.read_fields(answer[0][1])["H"].startswith("retry after ")
            assert kinds(probing.until(b"Z")[-2:]) == "EZ"
        eventually(lambda: kinds(refused.query("SELECT 1")) == "TDCZ", timeout=20)


def probes(client: RawClient, tenant: Organization) -> bool:
    """Send a query; tell whether it waits for a probe, rather than be refused."""
    client.send(messages.query("SELECT 1"))
    client.socket.settimeout(0.3)
    try:
        client.until(b"Z")
    except TimeoutError:
        return circuits(tenant) == {"half-open"}
    finally:
        client.socket.settimeout(10)
    return False


# Restarts.


def sleeps(target: EmbeddedPostgres) -> bool:
    """Whether some session of the target runs pg_sleep."""
    with psycopg.connect(target.dsn(), autocommit=True) as direct:
        rows = direct.execute(
            "SELECT FROM pg_stat_activity "
            "WHERE wait_event = 'PgSleep' AND state = 'active'"
        ).fetchall()
    return len(rows) > 0


@each_mode
@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGKILL, "08006"), (signal.SIGINT, "57P01")],
    ids=["kill", "fast"],
)
def test_a_target_that_restarts_ends_what_ran_and_serves_what_follows(
    tenant: Organization,
    target: EmbeddedPostgres,
    mode: PoolMode,
    number: signal.Signals,
    told: str,
) -> None:
    name = route(tenant, target, mode)
    with (
        RawClient.logged_in(tenant, name) as busy,
        RawClient.logged_in(tenant, name) as idle,
    ):
        busy.send(messages.query("SELECT pg_sleep(60)"))
        assert kinds(idle.query("SELECT 1")) == "TDCZ"
        eventually(lambda: sleeps(target))
        assert target.pid is not None
        os.kill(target.pid, number)
        fields = busy.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", told)
        asyncio.run(target.stop())
        asyncio.run(target.start())
        if mode is PoolMode.SESSION:
            idle.to_end()
        else:
            eventually(lambda: kinds(idle.query("SELECT 2")) == "TDCZ", timeout=20)
        eventually(lambda: connects(tenant, name), timeout=20)
    eventually(lambda: status(tenant)["clients"] == 0)
    assert status(tenant)["waiting"] == 0


def test_a_target_that_shuts_down_smartly_serves_who_is_there_and_then_ends(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with RawClient.logged_in(tenant, name) as client:
        client.query("BEGIN")
        assert target.pid is not None
        os.kill(target.pid, signal.SIGTERM)
        assert kinds(client.query("SELECT 1")) == "TDCZ"
        assert client.query("COMMIT")[-1] == (b"Z", b"I")
        # The idle server is closed in its time, so that Postgres can end.
        asyncio.run(target.wait_ended())
        asyncio.run(target.stop())
        asyncio.run(target.start())
        eventually(lambda: kinds(client.query("SELECT 1")) == "TDCZ", timeout=20)


# Servers that freeze.


@each_mode
def test_a_frozen_server_is_given_up_with_its_client(
    tenant: Organization, target: EmbeddedPostgres, mode: PoolMode
) -> None:
    name = route(tenant, target, mode)
    client = RawClient.logged_in(tenant, name)
    pid = int(client.query("SELECT pg_backend_pid()")[1][1][6:])
    with frozen(pid):
        client.send(messages.query("SELECT 1"))
        eventually(lambda: status(tenant)["idle"] == 0)
        client.close()
        eventually(lambda: status(tenant)["servers"] == 0)
        with tenant.connect(name) as after:
            assert works(after)


def test_an_idle_server_that_froze_is_closed_in_time(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with RawClient.logged_in(tenant, name) as client:
        pid = int(client.query("SELECT pg_backend_pid()")[1][1][6:])
        with frozen(pid):
            eventually(lambda: status(tenant)["servers"] == 0)
            assert kinds(client.query("SELECT 1")) == "TDCZ"


# What listens for clients.

LISTENERS = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'ogelproxy listen' "
    "ORDER BY backend_start DESC LIMIT 1"
)


def batch(sql: bytes) -> bytes:
    return b"".join(
        (
            messages.message(b"P", b"\0" + sql + b"\0\0\0"),
            messages.message(b"B", bytes(8)),
            messages.message(b"E", bytes(5)),
            messages.message(b"S", b""),
        )
    )


def test_a_listen_on_a_target_that_is_down_is_refused(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with RawClient.logged_in(tenant, name) as client:
        with stopped(target):
            eventually(lambda: status(tenant)["servers"] == 0)
            answer = client.query("LISTEN news")
            assert kinds(answer) == "EZ"
            assert messages.read_fields(answer[0][1])["C"] == "08006"
            client.send(batch(b"LISTEN news") + batch(b"SELECT 1"))
            assert kinds(client.until(b"Z")) == "12EZ"
            assert kinds(client.until(b"Z")) == "EZ"
        eventually(lambda: kinds(client.query("LISTEN news")) == "CZ", timeout=20)
        assert client.query("NOTIFY news, 'x'")[-1] == (b"Z", b"I")
        assert client.receive()[0] == b"A"


def test_a_frozen_connection_that_listens_is_given_up(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with (
        RawClient.logged_in(tenant, name) as listening,
        RawClient.logged_in(tenant, name) as asking,
    ):
        assert kinds(listening.query("LISTEN news")) == "CZ"
        with psycopg.connect(target.dsn(), autocommit=True) as direct:
            ((pid,),) = direct.execute(LISTENERS).fetchall()
        with frozen(pid):
            answer = asking.query("LISTEN other")
            assert messages.read_fields(answer[0][1])["C"] == "08006"
            fields = listening.refusal()
            assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
            assert kinds(asking.query("LISTEN other")) == "CZ"
            assert kinds(asking.query("SELECT 1")) == "TDCZ"


def test_a_cancelled_listen_takes_nothing_else_with_it(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    with RawClient(tenant.proxy) as client:
        client.start(tenant.handle, name)
        client.authenticate(tenant.key)
        key = dict(client.until(b"Z"))[b"K"]
        assert kinds(client.query("LISTEN news")) == "CZ"
        with psycopg.connect(target.dsn(), autocommit=True) as direct:
            ((pid,),) = direct.execute(LISTENERS).fetchall()
        with frozen(pid):
            client.query("UNLISTEN news")
            client.send(messages.query("LISTEN other"))
            with RawClient(tenant.proxy) as canceller:
                process_id = int.from_bytes(key[:4], "big")
                canceller.send(messages.cancel_request(process_id, key[4:]))
                canceller.to_end()
            answer = client.until(b"Z")
            assert messages.read_fields(answer[0][1])["C"] == "57014"
            client.send(messages.query("SELECT pg_sleep(2)"))
            assert kinds(client.until(b"Z")) == "TDCZ"
        eventually(lambda: kinds(client.query("LISTEN other")) == "CZ")


# Targets that are full, and the queue.


def limited(target: EmbeddedPostgres, connections: int) -> dict[str, str]:
    """Make a role that may have so many connections; return its login."""
    user, password = f"role_{secrets.token_hex(4)}", secrets.token_hex(8)
    with psycopg.connect(target.dsn(), autocommit=True) as direct:
        direct.execute(
            f"CREATE ROLE {user} LOGIN PASSWORD '{password}' "
            f"CONNECTION LIMIT {connections}".encode()
        )
    return {"user": user, "password": password}


def test_a_full_target_says_so(tenant: Organization, target: EmbeddedPostgres) -> None:
    name = route(tenant, target, **limited(target, 0))
    with RawClient(tenant.proxy) as client:
        client.start(tenant.handle, name)
        client.authenticate(tenant.key)
        fields = client.refusal()
    assert (fields["S"], fields["C"]) == ("FATAL", "53300")
    assert fields["M"] == "the database accepts no more connections"


def test_clients_of_a_full_target_wait_for_a_server_in_use(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target, **limited(target, 1))
    with (
        RawClient.logged_in(tenant, name) as holder,
        RawClient.logged_in(tenant, name) as waiter,
    ):
        holder.query("BEGIN")
        waiter.send(messages.query("SELECT 1"))
        eventually(lambda: circuits(tenant) == {"open"})
        assert status(tenant)["waiting"] == 1
        holder.query("COMMIT")
        assert kinds(waiter.until(b"Z")).removeprefix("N") == "TDCZ"


def test_a_client_that_waits_for_long_is_told_so_once(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    holders = [RawClient.logged_in(tenant, name) for _ in range(2)]
    waiters = [RawClient.logged_in(tenant, name) for _ in range(2)]
    for holder in holders:
        holder.query("BEGIN")
    for number, waiter in enumerate(waiters, 1):
        waiter.send(messages.query("SELECT 1"))
        eventually(lambda n=number: status(tenant)["waiting"] == n)
    for ahead, waiter in enumerate(waiters):
        kind, body = waiter.receive()
        fields = messages.read_fields(body)
        assert (kind, fields["S"], fields["C"]) == (b"N", "NOTICE", "00000")
        assert fields["M"].startswith(
            f"still waiting for a server connection ({ahead} ahead, 0."
        )
    holders[0].query("COMMIT")
    for waiter in waiters:
        assert kinds(waiter.until(b"Z")) == "TDCZ"
        waiter.close()
    for holder in holders:
        holder.close()
    eventually(lambda: status(tenant)["clients"] == 0)


def test_a_wait_for_a_full_pool_ends_in_time(
    tenant: Organization, target: EmbeddedPostgres
) -> None:
    name = route(tenant, target)
    holders = [RawClient.logged_in(tenant, name) for _ in range(2)]
    for holder in holders:
        holder.query("BEGIN")
    with RawClient.logged_in(tenant, name) as waiter:
        answer = waiter.query("SELECT 1")
        assert kinds(answer) == "NEZ"
        fields = messages.read_fields(answer[1][1])
        assert (fields["S"], fields["C"]) == ("ERROR", "53300")
        holders[0].query("COMMIT")
        assert kinds(waiter.query("SELECT 1")) == "TDCZ"
    for holder in holders:
        holder.close()
