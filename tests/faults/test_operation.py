"""Signals, wrong settings, ports that are taken, health, metrics, commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, eventually, kinds, samples


def run(proxy: Proxy, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command of ogelproxy in the proxy's environment."""
    done = subprocess.run(
        [sys.executable, "-m", "ogelproxy", *arguments],
        env=proxy.environment | environment,
        cwd=proxy.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# Signals.


def test_a_drain_lets_a_transaction_finish_and_tells_idle_clients(
    own_proxy: Proxy,
) -> None:
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with (
        RawClient.logged_in(organization, "transaction") as busy,
        RawClient.logged_in(organization, "session") as idle,
    ):
        busy.query("CREATE TABLE kept (n int)")
        idle.query("SELECT 1")
        busy.query("BEGIN")
        own_proxy.process.send_signal(signal.SIGTERM)
        fields = idle.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
        with pytest.raises(OSError):
            RawClient(own_proxy)
        busy.query("INSERT INTO kept VALUES (1)")
        assert busy.query("COMMIT")[-1] == (b"Z", b"I")
        assert busy.refusal()["C"] == "57P01"
        assert own_proxy.process.wait(10) == 0
    with psycopg.connect(organization.direct_dsn) as direct:
        assert direct.execute("SELECT n FROM kept").fetchall() == [(1,)]
    assert "Traceback" not in own_proxy.log.read_text()


def test_a_drain_lets_a_query_finish(own_proxy: Proxy) -> None:
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as client:
        client.send(messages.query("SELECT pg_sleep(0.5)"))
        client_is_served(organization)
        own_proxy.process.send_signal(signal.SIGTERM)
        assert kinds(client.until(b"Z")) == "TDCZ"
        assert client.refusal()["C"] == "57P01"
        assert own_proxy.process.wait(10) == 0


def client_is_served(organization: Organization) -> None:
    """Wait until a query of the organisation runs."""
    with psycopg.connect(organization.direct_dsn, autocommit=True) as direct:
        eventually(
            lambda: (
                direct.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE state = 'active' "
                    "AND datname = current_database() AND pid <> pg_backend_pid()"
                ).fetchone()
                is not None
            )
        )


def test_a_drain_waits_no_longer_than_it_may(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_DRAIN_TIMEOUT"] = "1"
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as client:
        client.query("BEGIN")
        began = time.monotonic()
        assert own_proxy.stop() == 0
        assert 0.9 < time.monotonic() - began < 5
        assert client.refusal()["C"] == "57P01"


def test_a_second_signal_ends_at_once(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_DRAIN_TIMEOUT"] = "60"
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as client:
        client.query("BEGIN")
        own_proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in own_proxy.log.read_text())
        own_proxy.process.send_signal(signal.SIGTERM)
        assert own_proxy.process.wait(5) == -signal.SIGTERM


def test_hanging_up_reads_settings_again_and_keeps_the_old_where_wrong(
    own_proxy: Proxy,
) -> None:
    path = own_proxy.directory / "ogelproxy.toml"
    path.write_text("")
    own_proxy.arguments = ["--config", str(path)]
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as client:
        client.query("BEGIN")
        path.write_text("[client]\nidle_in_transaction_timeout = 'soon'\n")
        own_proxy.process.send_signal(signal.SIGHUP)
        eventually(lambda: "not reloaded" in own_proxy.log.read_text())
        assert "client.idle_in_transaction_timeout" in own_proxy.log.read_text()
        assert client.query("SELECT 1")[-1] == (b"Z", b"T")
        path.write_text("[client]\nidle_in_transaction_timeout = 0.2\n")
        own_proxy.process.send_signal(signal.SIGHUP)
        assert client.refusal()["C"] == "25P03"
    assert "Traceback" not in own_proxy.log.read_text()


# Starts that fail.


def failed(proxy: Proxy, **environment: str) -> str:
    """Start in vain, and return the one sentence that says why."""
    code, out, error = run(proxy, "serve", **environment)
    assert code == 1, error
    assert out == ""
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize(
    ("variable", "option"), [("O7S_PORT", "listen.port"), ("PORT", "admin.port")]
)
def test_a_port_in_use_is_one_sentence_with_the_option(
    own_proxy: Proxy, variable: str, option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = failed(own_proxy, **{variable: port})
    assert option in sentence
    assert port in sentence


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("O7S_PORT", "many", "listen.port"),
        ("OGELPROXY_LISTEN_PORT", "70000", "listen.port"),
        ("OGELPROXY_POOL_MAX_SERVERS", "0", "pool.max_servers"),
        ("OGELPROXY_NO_SUCH", "1", "OGELPROXY_NO_SUCH"),
        ("O7S_LOG_LEVEL", "loud", "log.level"),
        ("O7S_SECRET_KEY", "short", "control.secret_key"),
        ("DATABASE_URL", "", "control.database_url"),
        ("OGELPROXY_TLS_CERT", "/nowhere.pem", "tls.key"),
        ("OGELPROXY_USAGE_SPOOL_DIR", "/proc/spool", "/proc/spool"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_name(
    own_proxy: Proxy, variable: str, value: str, named: str
) -> None:
    assert named in failed(own_proxy, **{variable: value})


def test_a_control_plane_that_is_away_is_one_sentence_without_its_password(
    own_proxy: Proxy,
) -> None:
    url = "postgresql://anna:hunter2hunter2@127.0.0.1:1/control"
    sentence = failed(own_proxy, DATABASE_URL=url)
    assert "hunter2" not in sentence


# What it tells.


def get(proxy: Proxy, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(proxy.admin_url(path), timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_and_readiness(proxy: Proxy) -> None:
    assert get(proxy, "/health")[0] == 200
    assert get(proxy, "/ready") == (200, {"ready": True, "reasons": []})


def test_a_draining_proxy_lives_and_is_not_ready(own_proxy: Proxy) -> None:
    own_proxy.start()
    assert own_proxy.process is not None
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(organization, "transaction") as client:
        client.query("BEGIN")
        own_proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: get(own_proxy, "/ready")[0] == 503)
        assert get(own_proxy, "/health")[0] == 200
        client.query("COMMIT")
    assert own_proxy.process.wait(10) == 0


def test_queries_refusals_and_logins_show_in_the_metrics(proxy: Proxy) -> None:
    organization = proxy.create_organization(tier="starter", limiter=LimiterMode.OFF)
    labels = '{database_type="postgres",tier="starter"}'
    before = samples(proxy)
    with organization.connect() as client:
        for _ in range(7):
            client.execute("SELECT 1")
        during = samples(proxy)
    with pytest.raises(psycopg.OperationalError):
        organization.connect("nowhere")

    def grown(name: str, now: dict[str, float]) -> float:
        return now.get(name, 0) - before.get(name, 0)

    assert grown(f"o7s_requests_total{labels}", during) == 7
    assert grown(f"o7s_latency_seconds_count{labels}", during) == 7
    assert during["o7s_clients"] >= 1
    name = 'o7s_refusals_total{code="database_unknown",kind="tenant"}'
    assert grown(name, samples(proxy)) == 1
    assert grown('o7s_logins_total{result="accepted"}', samples(proxy)) == 2


# Operators' commands.


def operate(proxy: Proxy, *arguments: str) -> Any:
    code, out, error = run(proxy, *arguments, "--json")
    assert code == 0, error
    return json.loads(out)


def test_an_organisation_made_by_commands_can_log_in_and_is_billed(
    proxy: Proxy, organization: Organization
) -> None:
    handle = f"org_cli_{os.getpid()}"
    made = operate(proxy, "org", "create", handle, "--tier", "pro")
    assert (made["handle"], made["tier"]) == (handle, "pro")
    key = operate(proxy, "key", "create", handle, "--name", "laptop")["secret"]
    dsn = organization.direct_dsn
    operate(proxy, "db", "create", handle, "main", "--dsn", dsn)
    with psycopg.connect(proxy.dsn(handle, key, "main"), autocommit=True) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
    eventually(lambda: bool(operate(proxy, "usage", "show", handle)), timeout=20)
    (day,) = operate(proxy, "usage", "show", handle)
    assert (day["query_count"], day["rows"]) == (1, 1)
    shown = operate(proxy, "org", "show", handle)
    assert key not in json.dumps(shown)


def test_a_command_that_can_not_be_done_is_one_sentence(proxy: Proxy) -> None:
    code, out, error = run(proxy, "org", "show", "org_that_is_not_there", "--json")
    assert (code, out) == (1, "")
    assert error.startswith("Error: ")
    assert "Traceback" not in error


def test_no_secret_is_in_the_arguments_of_the_process(proxy: Proxy) -> None:
    assert proxy.process is not None
    arguments = Path(f"/proc/{proxy.process.pid}/cmdline").read_bytes()
    assert proxy.secret_key.encode() not in arguments
    assert b"postgresql://" not in arguments
