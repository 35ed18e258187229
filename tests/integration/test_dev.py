"""`ogelproxy dev` as a person runs it: its own process, a directory, signals."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import psutil
import psycopg
import pytest
import redis

ORGANIZATIONS = ("free", "starter", "pro", "enterprise", "load")
SERVERS = ("postgres", "valkey")
SECOND_START_SECONDS = 2.0


class Stack:
    """A running `ogelproxy dev`."""

    def __init__(self, state: Path, *arguments: str) -> None:
        self.state = state
        self.output = ""  # until it was ready, and from its end on all of it
        self.process = subprocess.Popen(
            command("--state", str(state), *arguments),
            env={k: v for k, v in os.environ.items() if k != "MONGODB_URL"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("Ready"):
                return
        raise AssertionError(f"ended while starting: {self.output}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=30)
        self.output += output
        return self.process.returncode

    @property
    def description(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads((self.state / "dev.json").read_bytes())
        return found

    def url(self, tier: str = "free", name: str = "app") -> str:
        org = next(
            each
            for each in self.description["orgs"]
            if each["org"] == f"org_demo_{tier}"
        )
        return str(next(d["url"] for d in org["databases"] if d["name"] == name))


def command(*arguments: str) -> list[str]:
    ports = [
        part
        for option in ("--port", "--admin-port")
        if option not in arguments
        for part in (option, "0")
    ]
    return [sys.executable, "-m", "ogelproxy", "dev", *ports, *arguments]


def refused(*arguments: str) -> str:
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@contextmanager
def running(state: Path, *arguments: str) -> Iterator[Stack]:
    stack = Stack(state, *arguments)
    try:
        stack.wait_ready()
        yield stack
    finally:
        if stack.process.poll() is None:
            stack.stop()


def server_ports(stack: Stack) -> dict[str, int]:
    names = zip(SERVERS, ("postgres_url", "redis_url"), strict=True)
    ports = {server: urlsplit(stack.description[name]).port for server, name in names}
    return {server: port for server, port in ports.items() if port is not None}


def ask(url: str, question: str) -> object:
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="o7s-") as directory:
        yield Path(directory) / "state"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One stack for the tests that leave it as they found it."""
    with tempfile.TemporaryDirectory(prefix="o7s-") as directory:
        with running(Path(directory) / "state") as stack:
            yield stack


def test_dev_json_says_what_runs_and_is_private(stack: Stack) -> None:
    described = stack.description
    assert described["pid"] == stack.process.pid
    assert [org["org"] for org in described["orgs"]] == [
        f"org_demo_{name}" for name in ORGANIZATIONS
    ]
    assert [org["tier"] for org in described["orgs"]] == [
        "free",
        "starter",
        "pro",
        "enterprise",
        "enterprise",
    ]
    for name in ("dev.json", "secrets.json"):
        assert stat.S_IMODE((stack.state / name).stat().st_mode) == 0o600


def test_the_console_is_there_for_who_has_its_url(stack: Stack) -> None:
    url = stack.description["console_url"]
    assert url in stack.output
    assert str(ask(url, "SHOW VERSION")).startswith("ogelproxy ")


def test_both_ports_of_dev_json_are_open(stack: Stack) -> None:
    for name in ("port", "admin_port"):
        socket.create_connection(("127.0.0.1", stack.description[name])).close()


def test_the_valkey_of_dev_json_evicts_nothing(stack: Stack) -> None:
    with redis.Redis.from_url(stack.description["redis_url"]) as client:
        assert client.config_get("maxmemory-policy") == {
            "maxmemory-policy": "noeviction"
        }


def test_the_urls_that_are_printed_are_those_of_dev_json(stack: Stack) -> None:
    for org in stack.description["orgs"]:
        for database in org["databases"]:
            assert any(
                line.endswith(f" {database['url']}")
                for line in stack.output.splitlines()
            )


def test_the_doctor_finds_nothing_that_failed(stack: Stack) -> None:
    words = ["doctor", "--json", "--state", str(stack.state)]
    result = subprocess.run(
        [sys.executable, "-m", "ogelproxy", *words], capture_output=True, timeout=30
    )
    found = {each["subject"]: each for each in orjson.loads(result.stdout)}
    assert result.returncode == 0, found
    for name in ("listen.port", "admin.port"):
        assert "in use by a running ogelproxy" in found[name]["text"]
    assert found["redis eviction"]["verdict"] == "ok"
    assert found["secret key"]["text"].startswith("decrypts all")


@pytest.mark.parametrize("tier", ORGANIZATIONS)
def test_each_demo_organisation_reaches_its_own_database(
    stack: Stack, tier: str
) -> None:
    handle = f"org_demo_{tier}"
    assert ask(stack.url(tier), "SELECT current_user") == handle
    assert ask(stack.url(tier), "SELECT current_database()") == f"{handle}_app"


def test_the_databases_of_the_load_organisation_are_the_same_data(
    stack: Stack,
) -> None:
    names = ("app", "app_tx", "app_session")
    with psycopg.connect(stack.url("load", names[0]), autocommit=True) as connection:
        connection.execute("CREATE TABLE shared AS SELECT 5 AS n")
        try:
            for name in names:
                assert ask(stack.url("load", name), "SELECT n FROM shared") == 5
        finally:
            connection.execute("DROP TABLE shared")


def test_a_role_enters_no_database_but_its_own(stack: Stack) -> None:
    control = stack.description["postgres_url"]
    forbidden = ask(
        control,
        "SELECT count(*) FROM pg_roles r, pg_database d "
        "WHERE r.rolname LIKE 'org_demo_%' AND d.datname <> r.rolname || '_app' "
        "AND d.datallowconn AND has_database_privilege(r.oid, d.oid, 'CONNECT')",
    )
    assert forbidden == 0
    powers = ask(
        control,
        "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'org_demo_%' "
        "AND (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication "
        "OR rolbypassrls)",
    )
    assert powers == 0


def test_a_second_stack_on_the_same_directory_is_refused(stack: Stack) -> None:
    said = refused("--state", str(stack.state))
    assert f"another ogelproxy dev (process {stack.process.pid}) runs on" in said
    assert stack.description["pid"] == stack.process.pid


def test_no_secret_is_in_the_arguments_or_the_log_of_a_server(stack: Stack) -> None:
    kept = orjson.loads((stack.state / "secrets.json").read_bytes())
    words = [kept[f"{server}_password"] for server in SERVERS]
    words += [kept["secret_key"]]
    words += [word for org in kept["orgs"].values() for word in org.values()]
    children = psutil.Process(stack.process.pid).children()
    assert len(children) == len(SERVERS) + 1  # and MongoDB, which has no password
    seen = [" ".join(child.cmdline()) for child in children]
    seen += [(stack.state / server / "log").read_text() for server in SERVERS]
    for word in words:
        assert all(word not in text for text in seen)


@pytest.mark.parametrize("option", ["--port", "--admin-port"])
def test_a_port_in_use_is_named_with_its_option(state: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--state", str(state), option, str(port))
    assert said == (f"Error: {option} {port} is in use: choose another with {option}\n")
    assert not (state / "postgres").exists()


def test_a_second_start_is_quick_and_keeps_data_and_keys(state: Path) -> None:
    with running(state) as first:
        before = first.description
        with psycopg.connect(first.url("pro")) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    begun = time.monotonic()
    with running(state) as second:
        assert time.monotonic() - begun < SECOND_START_SECONDS
        assert ask(second.url("pro"), "SELECT n FROM kept") == 42
        keys = [org["api_key"] for org in second.description["orgs"]]
        assert keys == [org["api_key"] for org in before["orgs"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_that_was_started(
    state: Path, number: signal.Signals
) -> None:
    with running(state) as stack:
        ports = server_ports(stack)
        assert stack.stop(number) == 0
    assert not (state / "dev.json").exists()
    for port in ports.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_a_killed_stack_takes_its_servers_along_and_starts_again(
    state: Path,
) -> None:
    with running(state) as first:
        children = psutil.Process(first.process.pid).children()
        first.process.kill()
        first.process.communicate()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert (state / "dev.json").exists()
    with running(state) as second:
        assert ask(second.url(), "SELECT 1") == 1


def test_workers_serve_roll_and_end_with_their_stack(state: Path) -> None:
    with running(state, "--workers", "2") as stack:
        first = workers(stack)
        assert len(first) == 2
        assert ask(stack.url(), "SELECT 1") == 1
        stack.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + 30
        while len(workers(stack) - first) < 2 or workers(stack) & first:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(stack.url(), "SELECT 1") == 1
        processes = [psutil.Process(pid) for pid in workers(stack)]
        stack.stop(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []


def workers(stack: Stack) -> set[int]:
    """The process ids of all workers."""
    url = f"http://127.0.0.1:{stack.description['admin_port']}/status"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return {each["pid"] for each in orjson.loads(answer.read())["workers"]}


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_that_ends_by_itself_ends_the_stack_with_its_name(
    state: Path, server: str
) -> None:
    with running(state) as stack:
        child = next(
            each
            for each in psutil.Process(stack.process.pid).children()
            if each.name().startswith(server)
        )
        child.kill()
        output, _ = stack.process.communicate(timeout=30)
    assert stack.process.returncode == 1
    said = f"{server.title()} ended unexpectedly (status -9): see {state / server}"
    assert said in output


@pytest.mark.parametrize("server", SERVERS)
def test_a_servers_port_taken_meanwhile_is_given_up(state: Path, server: str) -> None:
    with running(state) as first:
        port = server_ports(first)[server]
    with socket.create_server(("127.0.0.1", port)), running(state) as second:
        assert server_ports(second)[server] != port
        assert ask(second.url(), "SELECT 1") == 1


def test_the_history_of_a_stack_is_in_its_mongodb_and_stays(state: Path) -> None:
    words = ["usage", "history", "org_demo_free", "--json", "--state", str(state)]

    def history() -> list[dict[str, Any]]:
        result = subprocess.run(
            [sys.executable, "-m", "ogelproxy", *words],
            capture_output=True,
            timeout=30,
            check=True,
        )
        found: list[dict[str, Any]] = orjson.loads(result.stdout)
        return found

    for count in (1, 2):
        with running(state) as stack:
            mongodb_url = stack.description["mongodb_url"]
            assert ask(stack.url(), "SELECT 1") == 1
            (child,) = (
                each
                for each in psutil.Process(stack.process.pid).children()
                if "secantus" in each.cmdline()
            )
            assert stack.stop() == 0
        assert not child.is_running()
        # What the proxy delivered at its end is there at the next start.
        with running(state) as stack:
            assert stack.description["mongodb_url"] == mongodb_url
            (row,) = history()
            assert row["queries"] == count


def test_a_stack_without_the_package_says_so_and_does_without(state: Path) -> None:
    program = "import sys; sys.modules['secantus'] = None; import ogelproxy.__main__"
    words = command("--state", str(state))[3:]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("Ready"):
            break
    described = orjson.loads((state / "dev.json").read_bytes())
    assert described["mongodb_url"] is None
    assert "Leaving out MongoDB, as SecantusDB is not installed" in output
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


def test_a_stack_made_before_there_was_a_valkey_gets_one(state: Path) -> None:
    with running(state) as first:
        url = first.url()
    path = state / "secrets.json"
    kept = orjson.loads(path.read_bytes())
    for name in ("valkey_password", "valkey_port", "redis_url"):
        del kept[name]
    path.write_bytes(orjson.dumps(kept))
    with running(state) as second:
        key = urlsplit(url).password
        assert urlsplit(second.url()).password == key
        with redis.Redis.from_url(second.description["redis_url"]) as client:
            assert client.ping()


def test_lost_secrets_are_a_sentence_and_not_a_hang(state: Path) -> None:
    with running(state):
        pass
    (state / "secrets.json").unlink()
    said = refused("--state", str(state))
    assert f"remove {state} to start afresh" in said


def test_tls_offers_a_certificate_and_keeps_it(state: Path) -> None:
    for _ in range(2):
        with running(state, "--tls") as stack:
            assert stack.url().endswith("?sslmode=require")
            assert ask(stack.url(), "SELECT 1") == 1
            certificate = (state / "tls.pem").read_bytes()
    assert (state / "tls.pem").read_bytes() == certificate
    assert stat.S_IMODE((state / "tls.key").stat().st_mode) == 0o600
