"""EmbeddedValkey: found, started, private, stopped, never left behind."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis

from ogelproxy.child import EPHEMERAL_PORTS, MIN_PORT, free_port
from ogelproxy.config import Secret
from ogelproxy.embedded_valkey import EmbeddedValkey, find_valkey
from ogelproxy.errors import EmbeddedFailed
from tests.fixtures.redis import Valkey

#: Starts Valkey in its own process, says its pid, waits to be killed.
OWNER = """
import asyncio, signal, sys
from pathlib import Path
from ogelproxy.config import Secret
from ogelproxy.embedded_valkey import EmbeddedValkey
valkey = EmbeddedValkey(Path(sys.argv[1]), password=Secret("none"))
asyncio.run(valkey.start())
print(valkey.pid, flush=True)
signal.pause()
"""
WAIT_SECONDS = 20.0


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    server = make(tmp_path / "valkey")
    await server.start()
    yield server
    await server.stop()


def make(directory: Path, **settings: str) -> EmbeddedValkey:
    return EmbeddedValkey(
        directory, password=Secret(secrets.token_urlsafe(12)), settings=settings
    )


def about(pid: int | None, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def ask(url: str, *command: str) -> object:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return client.execute_command(*command)


async def test_it_answers_who_has_the_password_and_nobody_else(
    embedded: EmbeddedValkey,
) -> None:
    assert ask(embedded.url, "PING")
    for login in ("", ":wrong@"):
        with pytest.raises(redis.AuthenticationError):
            ask(f"redis://{login}127.0.0.1:{embedded.port}", "PING")


async def test_it_evicts_nothing_and_writes_nothing(embedded: EmbeddedValkey) -> None:
    assert ask(embedded.url, "CONFIG", "GET", "maxmemory-policy") == {
        "maxmemory-policy": "noeviction"
    }
    ask(embedded.url, "SET", "key", "value")
    await embedded.restart()
    assert ask(embedded.url, "GET", "key") is None
    assert not list(embedded.data.iterdir())


async def test_a_log_may_be_asked_for_and_survives_a_kill(tmp_path: Path) -> None:
    server = make(tmp_path / "valkey", appendonly="yes", appendfsync="always")
    await server.start()
    try:
        ask(server.url, "SET", "key", "value")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait_ended() == -signal.SIGKILL
        await server.start()
        assert ask(server.url, "GET", "key") == "value"
    finally:
        await server.stop()


async def test_the_password_is_in_no_argument_no_environment_and_no_file(
    embedded: EmbeddedValkey,
) -> None:
    secret = embedded._password.get_secret_value()
    for name in ("cmdline", "environ"):
        assert secret not in about(embedded.pid, name)
    files = [path for path in embedded.directory.rglob("*") if path.is_file()]
    assert files == [embedded.log]
    assert secret not in embedded.log.read_text()
    assert secret not in repr(embedded._password)


async def test_any_password_and_directory_are_taken(tmp_path: Path) -> None:
    word = "a \"b\" 'c' \\ #d \n ü"
    server = EmbeddedValkey(tmp_path / word.replace("\n", ""), password=Secret(word))
    await server.start()
    try:
        assert ask(server.url, "PING")
    finally:
        await server.stop()


async def test_it_listens_on_loopback_only(embedded: EmbeddedValkey) -> None:
    found = ask(embedded.url, "CONFIG", "GET", "bind")
    assert found == {"bind": "127.0.0.1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to drop")
async def test_root_runs_it_as_nobody(embedded: EmbeddedValkey) -> None:
    assert "Uid:\t65534\t65534\t65534\t65534" in about(embedded.pid, "status")


def test_it_ends_when_its_owner_is_killed_even_when_frozen(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path / "valkey"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        owner.send_signal(signal.SIGKILL)
        try:
            assert select.select([ended], [], [], WAIT_SECONDS)[0]
        finally:
            os.close(ended)


async def test_one_left_on_the_directory_is_stopped(tmp_path: Path) -> None:
    first, neighbour = make(tmp_path / "one"), make(tmp_path / "other")
    await first.start()
    await neighbour.start()
    second = make(tmp_path / "one")
    try:
        await second.start()
        assert first.pid is None
        assert ask(second.url, "PING") and ask(neighbour.url, "PING")
    finally:
        for server in (first, second, neighbour):
            await server.stop()


async def test_a_taken_port_gives_way_to_a_free_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = EmbeddedValkey(tmp_path / "v", password=Secret("none"), port=port)
        await server.start()
        try:
            assert server.port != port
            assert ask(server.url, "PING")
        finally:
            await server.stop()


async def test_a_setting_that_it_refuses_fails_with_its_words(tmp_path: Path) -> None:
    server = make(tmp_path / "valkey", maxmemory_policy="none")
    with pytest.raises(EmbeddedFailed, match="maxmemory_policy"):
        await server.start()
    assert server.pid is None


async def test_stopping_twice_is_stopping_once(embedded: EmbeddedValkey) -> None:
    await embedded.stop()
    await embedded.stop()
    assert embedded.pid is None


def test_a_named_program_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(EmbeddedFailed, match="no such program"):
            find_valkey({"OGELPROXY_VALKEY_BIN": str(path)})


@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
async def test_without_the_wheel_the_system_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).symlink_to(find_valkey({}))
    monkeypatch.setattr("ogelproxy.embedded_valkey.WHEEL", "no_such_wheel")
    environ = {"PATH": str(tmp_path)}
    assert find_valkey(environ) == tmp_path / name
    server = EmbeddedValkey(
        tmp_path / "valkey", password=Secret("none"), environ=environ
    )
    await server.start()
    try:
        assert ask(server.url, "PING")
    finally:
        await server.stop()
    with pytest.raises(EmbeddedFailed, match="no Valkey found"):
        find_valkey({"PATH": "/nowhere"})


def test_a_free_port_is_none_of_outgoing_connections() -> None:
    assert MIN_PORT <= free_port() < EPHEMERAL_PORTS


def test_the_session_valkey_answers(valkey: Valkey) -> None:
    assert ask(valkey.url, "PING")


def test_a_killed_server_comes_back_empty_on_its_port(own_valkey: Valkey) -> None:
    url = own_valkey.url
    ask(url, "SET", "key", "value")
    own_valkey.kill()
    assert own_valkey.pid is None
    with pytest.raises(redis.ConnectionError):
        ask(url, "PING")
    own_valkey.start()
    assert ask(url, "GET", "key") is None


def test_a_frozen_server_is_silent_until_it_is_thawed(own_valkey: Valkey) -> None:
    own_valkey.freeze()
    client = redis.Redis.from_url(own_valkey.url, socket_timeout=0.2)
    with client, pytest.raises(redis.TimeoutError):
        client.ping()
    own_valkey.thaw()
    assert ask(own_valkey.url, "PING")


async def test_servers_are_made_and_restarted_inside_of_a_loop(
    valkeys: Callable[..., Valkey],
) -> None:
    one, other = valkeys(), valkeys(maxmemory_policy="allkeys-lru")
    one.restart()
    assert ask(one.url, "PING")
    assert ask(other.url, "CONFIG", "GET", "maxmemory-policy") == {
        "maxmemory-policy": "allkeys-lru"
    }
