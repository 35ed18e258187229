"""Peers: other proxies before the same Postgres, each started as its manual says.

A peer is found on PATH or named by the environment, `OGELPROXY_PGBOUNCER_BIN` for
instance. Their settings are their defaults, but for what makes a comparison one of
like with like: as many servers as ours, one thread, logins by SCRAM where they can.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import signal
import subprocess
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import psycopg

from ogelproxy.auth.scram import ITERATIONS, SALT_BYTES, make_verifier
from ogelproxy.child import LOOPBACK, Child
from ogelproxy.embedded import SUPERUSER, EmbeddedPostgres
from ogelproxy.tenants.model import PoolMode

#: Who logs in to a peer, and the modes in which it pools, as names of its databases.
USER = "bench"
MODES = (PoolMode.TRANSACTION, PoolMode.SESSION)
#: Debian's place for servers, which is not on everybody's PATH.
SERVERS = "/usr/sbin"
#: Seconds that it may take to say whether it is ready.
PROBE_TIMEOUT = 2
MAX_CLIENTS = 10_000
#: From this version on its transaction mode knows prepared statements (NEWS.md).
PREPARING_PGBOUNCER = (1, 21)
#: Statements kept where that is off until asked for: PgBouncer's default.
MAX_PREPARED_STATEMENTS = 200


class PeerMissing(Exception):
    """No binary of that name is here."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The Postgres behind a peer, and how many connections to it a pool may have."""

    postgres: EmbeddedPostgres
    database: str
    password: str  # of the superuser
    servers: int


class Peer(Child):
    """A proxy by somebody else, with a database per mode, named `mode.value`."""

    name: ClassVar[str]  # of its binary
    #: Whether it can log in to Postgres by its Unix socket.
    speaks_unix: ClassVar[bool]
    stop_signals = (signal.SIGTERM, signal.SIGKILL)
    death_signal = signal.SIGKILL

    def __init__(self, directory: Path, upstream: Upstream, password: str) -> None:
        super().__init__(directory, None)
        self.binary = find(self.name)
        self.upstream = upstream
        self.password = password  # of USER

    @cached_property
    def version(self) -> str:
        """What it says its version is: 1.25.2."""
        done = subprocess.run(
            [str(self.binary), "--version"], capture_output=True, text=True, check=True
        )
        found = re.search(r"\d+(\.\d+)+", done.stdout)
        return found[0] if found else done.stdout.strip()

    def can_prepare(self, mode: PoolMode) -> bool:
        """Whether prepared statements work in a mode."""
        return True

    def url(self, mode: PoolMode) -> str:
        login = f"{USER}:{self.password}"
        return f"postgresql://{login}@{LOOPBACK}:{self.port}/{mode.value}"

    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """Return its configuration: texts by names."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return how it is started on those files."""

    async def start(self) -> None:
        """Write its files, start it, wait until queries pass; raises EmbeddedFailed."""
        await self._prepare()
        for name, text in self.files().items():
            path = self.directory / name
            path.write_text(text)
            self._own(path)
        command = [*self._launcher(self.binary.parent), *self.command()]
        self._process = self._spawn(command, cwd=self.directory)
        await self._wait_ready()

    def is_ready(self) -> bool:
        try:
            with psycopg.connect(
                self.url(MODES[0]),
                connect_timeout=PROBE_TIMEOUT,
                prepare_threshold=None,
            ) as connection:
                connection.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True


class PgBouncer(Peer):
    """It hands on what its clients have proven, to a role with the same secret.

    From a password it would derive the keys anew at each of their logins.
    """

    name = title = "pgbouncer"
    commands = frozenset({"pgbouncer"})
    speaks_unix = True

    def __init__(self, directory: Path, upstream: Upstream, password: str) -> None:
        super().__init__(directory, upstream, password)
        salt = secrets.token_bytes(SALT_BYTES)
        keys = make_verifier(password, salt, ITERATIONS)
        parts = [base64.b64encode(each).decode() for each in (salt, *keys)]
        self._secret = f"SCRAM-SHA-256${ITERATIONS}:{parts[0]}${parts[1]}:{parts[2]}"

    async def start(self) -> None:
        with psycopg.connect(self.upstream.postgres.dsn()) as connection:
            connection.execute(f"DROP ROLE IF EXISTS {USER}")
            role = f"CREATE ROLE {USER} LOGIN SUPERUSER PASSWORD '{self._secret}'"
            connection.execute(role.encode())
        await super().start()

    def can_prepare(self, mode: PoolMode) -> bool:
        numbers = tuple(map(int, self.version.split(".")[:2]))
        return mode is PoolMode.SESSION or numbers >= PREPARING_PGBOUNCER

    def files(self) -> Mapping[str, str]:
        its = self.upstream
        host = its.postgres.socket_directory or LOOPBACK
        where = f"host={host} port={its.postgres.port} dbname={its.database}"
        databases = [f"{mode.value} = {where} pool_mode={mode.value}" for mode in MODES]
        settings = {
            "listen_addr": LOOPBACK,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": self.directory / "users",
            "default_pool_size": its.servers,
            "max_client_conn": MAX_CLIENTS,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        return {
            "pgbouncer.ini": "\n".join(
                ["[databases]", *databases, "[pgbouncer]", *lines, ""]
            ),
            "users": f'"{USER}" "{self._secret}"\n',
        }

    def command(self) -> list[str]:
        return [str(self.binary), str(self.directory / "pgbouncer.ini")]


class PgCat(Peer):
    """Its clients log in by MD5, the only way that it has."""

    name = title = "pgcat"
    commands = frozenset({"pgcat"})
    speaks_unix = False

    def files(self) -> Mapping[str, str]:
        its = self.upstream
        pools = [
            f"""
[pools.{mode.value}]
pool_mode = "{mode.value}"
prepared_statements_cache_size = {MAX_PREPARED_STATEMENTS}
[pools.{mode.value}.users.0]
username = "{USER}"
password = "{self.password}"
server_username = "{SUPERUSER}"
server_password = "{its.password}"
pool_size = {its.servers}
[pools.{mode.value}.shards.0]
servers = [["{LOOPBACK}", {its.postgres.port}, "primary"]]
database = "{its.database}"
"""
            for mode in MODES
        ]
        general = f"""
[general]
host = "{LOOPBACK}"
port = {self.port}
admin_username = "{USER}"
admin_password = "{self.password}"
worker_threads = 1
"""
        return {"pgcat.toml": "".join([general, *pools])}

    def command(self) -> list[str]:
        return [
            *(str(self.binary), "--log-level", "WARN"),
            str(self.directory / "pgcat.toml"),
        ]


class PgDog(Peer):
    name = title = "pgdog"
    commands = frozenset({"pgdog"})
    speaks_unix = False

    def files(self) -> Mapping[str, str]:
        its = self.upstream
        general = f"""
[general]
host = "{LOOPBACK}"
port = {self.port}
workers = 1
default_pool_size = {its.servers}
auth_type = "scram"
"""
        databases = [
            f"""
[[databases]]
name = "{mode.value}"
host = "{LOOPBACK}"
port = {its.postgres.port}
database_name = "{its.database}"
"""
            for mode in MODES
        ]
        users = [
            f"""
[[users]]
name = "{USER}"
database = "{mode.value}"
password = "{self.password}"
server_user = "{SUPERUSER}"
server_password = "{its.password}"
pooler_mode = "{mode.value}"
"""
            for mode in MODES
        ]
        return {
            "pgdog.toml": "".join([general, *databases]),
            "users.toml": "".join(users),
        }

    def command(self) -> list[str]:
        files = [str(self.directory / name) for name in ("pgdog.toml", "users.toml")]
        return [str(self.binary), "--config", files[0], "--users", files[1]]


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (PgBouncer, PgCat, PgDog)}


def variable(name: str) -> str:
    """Return what the environment calls the binary of a peer."""
    return f"OGELPROXY_{name.upper()}_BIN"


def find(name: str) -> Path:
    """Return a peer's binary. Raises PeerMissing."""
    named = os.environ.get(variable(name))
    path = shutil.which(
        named or name, path=f"{os.environ.get('PATH', os.defpath)}:{SERVERS}"
    )
    if path is None:
        raise PeerMissing(f"no {named or name} here: name one in {variable(name)}")
    return Path(path).resolve()


def present() -> list[type[Peer]]:
    """Return the peers that are here."""
    found = []
    for peer in PEERS.values():
        try:
            find(peer.name)
        except PeerMissing:
            continue
        found.append(peer)
    return found
