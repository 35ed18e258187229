"""Several workers behind one port: who serves, what they tell, how they change."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy, create_operator
from tests.fixtures.faults import RawClient, eventually, samples
from tests.fixtures.load import at_least, billed
from tests.fixtures.redis import Valkey
from tests.fixtures.workers import Comers, Workers, is_running

CANCELED = "57014"


def test_both_workers_get_connections(workers: Workers) -> None:
    tenant = workers.create_organization(limiter=LimiterMode.OFF)
    clients = [tenant.connect("transaction") for _ in range(24)]
    told = workers.status()
    counts = [worker["status"]["clients"] for worker in told["workers"]]
    assert sum(counts) == told["clients"] >= 24
    assert all(counts), counts
    for client in clients:
        assert client.execute("SELECT 1").fetchone() == (1,)
        client.close()


def test_a_port_that_another_proxy_listens_on_is_not_shared_with_it(
    workers: Workers, own_workers: Workers
) -> None:
    own_workers.settings["O7S_PORT"] = str(workers.port)
    with pytest.raises(AssertionError, match="Address already in use"):
        own_workers.start()


def test_a_worker_that_can_not_start_ends_the_start_with_its_reason(
    own_workers: Workers,
) -> None:
    own_workers.settings["DATABASE_URL"] = "postgresql://a:hunter2@127.0.0.1:1/control"
    with pytest.raises(AssertionError) as caught:
        own_workers.start()
    text = str(caught.value)
    assert text.count("\nError: ") == 1
    assert "hunter2" not in text
    assert "Traceback" not in text


def test_secrets_are_in_no_argument_and_no_environment_of_a_worker(
    workers: Workers, valkey: Valkey
) -> None:
    for pid in workers.pids().values():
        told = Path(f"/proc/{pid}/cmdline").read_bytes()
        told += Path(f"/proc/{pid}/environ").read_bytes()
        assert workers.secret_key.encode() not in told
        assert valkey.url.encode() not in told
        assert b"postgresql://" not in told


def test_metrics_are_those_of_all_workers(workers: Workers) -> None:
    tenant = workers.create_organization(tier="pro", limiter=LimiterMode.OFF)
    name = 'o7s_requests_total{database_type="postgres",tier="pro"}'
    clients = [workers.client(tenant, place) for place in (1, 2)]
    during = samples(workers)
    for client in clients:
        for _ in range(50):
            client.query("SELECT 1")
    after = samples(workers)
    assert after[name] - during.get(name, 0) == 100
    assert after["o7s_clients"] >= 2
    assert after["o7s_workers"] == 2
    assert after["o7s_control_up"] == after["o7s_redis_up"] == 1
    buckets = 'o7s_latency_seconds_count{database_type="postgres",tier="pro"}'
    assert after[buckets] == after[name]
    for client in clients:
        client.close()


@pytest.mark.parametrize("place", [1, 2])
def test_a_cancel_request_finds_the_worker_that_it_is_for(
    workers: Workers, place: int
) -> None:
    tenant = workers.create_organization(limiter=LimiterMode.OFF)
    with workers.client(tenant, place) as client:
        # It is not ours to say which worker a cancel request reaches.
        for _ in range(8):
            cancelled(client, tenant, workers)


def cancelled(client: RawClient, tenant: Organization, reached: Proxy) -> None:
    """Run a query, cancel it by way of `reached`, and see it end."""
    client.send(messages.query("SELECT pg_sleep(20)"))
    with psycopg.connect(tenant.direct_dsn, autocommit=True) as direct:
        eventually(
            lambda: (
                direct.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' "
                    "AND datname = current_database()"
                ).fetchone()
                is not None
            )
        )
    with RawClient(reached) as other:
        other.send(messages.cancel_request(client.process_id, client.secret))
        assert other.to_end() == []
    answer = client.until(b"Z")
    errors = [messages.read_fields(body)["C"] for kind, body in answer if kind == b"E"]
    assert errors == [CANCELED]


def test_a_cancel_request_finds_another_machine(
    workers: Workers, own_proxy: Proxy, valkey: Valkey
) -> None:
    own_proxy.control = workers.control
    own_proxy.secret_key = workers.secret_key
    own_proxy.settings["REDIS_URL"] = valkey.url
    own_proxy.start()
    tenant = workers.create_organization(limiter=LimiterMode.OFF)
    with workers.client(tenant, 1) as client:
        cancelled(client, tenant, own_proxy)


def test_made_up_cancel_keys_do_nothing_and_cost_little(workers: Workers) -> None:
    tenant = workers.create_organization(limiter=LimiterMode.OFF)
    with workers.client(tenant, 1) as client:
        client.send(messages.query("SELECT pg_sleep(1)"))
        for number in range(200):
            with RawClient(workers) as other:
                key = client.process_id + number % 3
                other.send(messages.cancel_request(key, b"nope"))
        assert client.until(b"Z")[0][0] == b"T"
        cancelled(client, tenant, workers)


def test_settings_are_read_again_for_all_workers(own_workers: Workers) -> None:
    path = own_workers.directory / "ogelproxy.toml"
    path.write_text("")
    own_workers.arguments += ["--config", str(path)]
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    clients = [own_workers.client(tenant, place) for place in (1, 2)]
    for client in clients:
        client.query("BEGIN")
    path.write_text("[client]\nidle_in_transaction_timeout = 'soon'\n")
    own_workers.signal_supervisor(signal.SIGHUP)
    eventually(lambda: "not reloaded" in own_workers.log.read_text())
    for client in clients:
        assert client.query("SELECT 1")[-1] == (b"Z", b"T")
    path.write_text("[client]\nidle_in_transaction_timeout = 0.2\n")
    own_workers.signal_supervisor(signal.SIGHUP)
    for client in clients:
        assert client.refusal()["C"] == "25P03"
    assert "Traceback" not in own_workers.log.read_text()


def test_a_worker_that_starts_meanwhile_gets_the_new_settings(
    own_workers: Workers,
) -> None:
    path = own_workers.directory / "ogelproxy.toml"
    path.write_text("")
    own_workers.arguments += ["--config", str(path)]
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    killed = own_workers.signal(2, signal.SIGKILL)
    eventually(
        lambda: any(
            worker["state"] == "starting" for worker in own_workers.status()["workers"]
        )
    )
    # Before it has asked for its settings, and a little later.
    for seconds in (5.0, 0.2):
        path.write_text(f"[client]\nidle_in_transaction_timeout = {seconds}\n")
        own_workers.signal_supervisor(signal.SIGHUP)
    own_workers.wait_replaced(killed)
    with own_workers.client(tenant, 2) as client:
        client.query("BEGIN")
        assert client.refusal()["C"] == "25P03"
    assert "Traceback" not in own_workers.log.read_text()


def test_a_drain_lets_transactions_of_all_workers_finish(own_workers: Workers) -> None:
    own_workers.start()
    assert own_workers.process is not None
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    busy = [own_workers.client(tenant, place) for place in (1, 2)]
    idle = [own_workers.client(tenant, place) for place in (1, 2)]
    pids = own_workers.pids()
    for client in busy:
        client.query("BEGIN")
    own_workers.signal_supervisor(signal.SIGTERM)
    for client in idle:
        assert client.refusal()["C"] == "57P01"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(own_workers.admin_url("/ready"), timeout=5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", own_workers.port), 5)
    for client in busy:
        assert client.query("COMMIT")[-1] == (b"Z", b"I")
        assert client.refusal()["C"] == "57P01"
    assert own_workers.process.wait(10) == 0
    assert not any(map(is_running, pids.values()))
    assert "Traceback" not in own_workers.log.read_text()


def test_a_second_signal_ends_all_workers_at_once(own_workers: Workers) -> None:
    own_workers.settings["OGELPROXY_DRAIN_TIMEOUT"] = "60"
    own_workers.start()
    assert own_workers.process is not None
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    pids = own_workers.pids().values()
    with own_workers.client(tenant, 1) as client:
        client.query("BEGIN")
        own_workers.signal_supervisor(signal.SIGTERM)
        eventually(lambda: "draining" in own_workers.log.read_text())
        own_workers.signal_supervisor(signal.SIGTERM)
        assert own_workers.process.wait(5) == -signal.SIGTERM
        eventually(lambda: not any(map(is_running, pids)))


def test_rolling_replaces_all_and_nobody_who_comes_is_turned_away(
    own_workers: Workers,
) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    before = own_workers.pids()
    name = 'o7s_logins_total{result="accepted"}'
    with own_workers.client(tenant, 1) as idle, Comers(tenant) as comers:
        comers.wait_served(50)
        counted = samples(own_workers)[name]
        own_workers.signal_supervisor(signal.SIGUSR1)
        after = own_workers.wait_replaced(*before.values())
        comers.wait_served(50)
        assert idle.refusal()["C"] == "57P01"
    assert set(after) == {1, 2}
    assert comers.ends["refused"] == comers.ends["cut"] == 0, comers.errors
    eventually(lambda: not any(map(is_running, before.values())))
    # What the old ones counted is not lost.
    told = samples(own_workers)
    assert told[name] >= counted
    assert told["o7s_worker_restarts_total"] == 0
    own_workers.stop()
    # Who parted may have been answered before it was, or not.
    uncertain = billed(tenant)["queries"] - comers.ends["served"]
    assert 0 <= uncertain <= comers.ends["parted"]
    assert "Traceback" not in own_workers.log.read_text()


def test_a_roll_that_fails_leaves_who_serves(own_workers: Workers) -> None:
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    before = own_workers.pids()
    # The next one finds no room for its usage.
    (own_workers.directory / "spool" / "worker-3").touch()
    own_workers.signal_supervisor(signal.SIGUSR1)
    eventually(lambda: "ended early" in own_workers.log.read_text())
    assert own_workers.pids() == before
    with tenant.connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_usage_left_in_one_layout_is_delivered_in_the_other(
    own_workers: Workers,
) -> None:
    own_workers.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "60"
    many = own_workers.arguments
    sent = 0
    for arguments in (many, [], many):
        own_workers.arguments = arguments
        own_workers.start()
        if not sent:
            tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
        with tenant.connect("transaction") as client:
            for _ in range(5):
                client.execute("SELECT 1")
                sent += 1
        own_workers.kill()
    own_workers.start()
    eventually(at_least(tenant, sent), timeout=20)
    own_workers.stop()
    assert billed(tenant)["queries"] == sent


def test_a_reload_in_a_console_reaches_all_workers(own_workers: Workers) -> None:
    path = own_workers.directory / "ogelproxy.toml"
    path.write_text("")
    own_workers.arguments += ["--config", str(path)]
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    clients = [own_workers.client(tenant, place) for place in (1, 2)]
    with psycopg.connect(create_operator(own_workers)[0], autocommit=True) as console:
        path.write_text("[client]\nidle_in_transaction_timeout = 'soon'\n")
        with pytest.raises(psycopg.errors.ConfigFileError):
            console.execute("RELOAD")
        path.write_text("[client]\nidle_in_transaction_timeout = 0.2\n")
        assert console.execute("RELOAD").statusmessage == "RELOAD"
    for client in clients:
        client.query("BEGIN")
        assert client.refusal()["C"] == "25P03"


def test_a_shutdown_in_a_console_ends_all_workers(own_workers: Workers) -> None:
    own_workers.start()
    assert own_workers.process is not None
    pids = own_workers.pids().values()
    with psycopg.connect(create_operator(own_workers)[0], autocommit=True) as console:
        console.execute("SHUTDOWN")
    assert own_workers.process.wait(10) == 0
    assert not any(map(is_running, pids))
    assert "replaced" not in own_workers.log.read_text()


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_proxy_starts_and_ends_well_without_a_standard_stream(
    own_workers: Workers, closed: int
) -> None:
    own_workers.program = [
        "-c",
        f"import os; os.close({closed}); from ogelproxy.cli import main; main()",
    ]
    own_workers.start()
    assert own_workers.stop() == 0
