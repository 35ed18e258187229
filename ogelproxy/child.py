"""Child: a server process of our own, which never outlives us.

Owns its directory and its port, how it is launched, waited for, ended, and what a
killed run left of it. What runs, with which arguments, and what counts as ready
is the subclass's: EmbeddedPostgres, EmbeddedValkey. Root's servers run as `nobody`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from ogelproxy.errors import EmbeddedFailed

LOOPBACK = "127.0.0.1"
POLL_INTERVAL = 0.005
#: Seconds for the first start after a crash too, when a log is replayed.
START_TIMEOUT = 60.0
#: Seconds that each of a child's stop signals is given.
STOP_TIMEOUT = 10.0
UNPRIVILEGED_USER = "nobody"

#: Ports from here up need no rights and are rarely anybody's by convention.
MIN_PORT = 20_000
#: The first port that the kernel gives to outgoing connections (ip(7)), where it
#: does not tell.
EPHEMERAL_PORTS = 32_768
PORT_TRIES = 100


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now.

    None that the kernel gives to outgoing connections: those would stand in the
    way of a server that starts there again, or, made to the port while it is
    down, reach themselves.
    """
    try:
        ports = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        end = int(ports.split()[0])
    except OSError:
        end = EPHEMERAL_PORTS
    for _ in range(PORT_TRIES if end > MIN_PORT else 0):
        # Several runs at once are not to try the same ones.
        port = random.randrange(MIN_PORT, end)
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        bound: int = probe.getsockname()[1]
        return bound


def is_free(port: int, host: str = LOOPBACK) -> bool:
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


class Child(ABC):
    """One server whose files and log lie below `directory`.

    It listens on `port` if that is free when it starts and on another one
    otherwise. `start` must run in the main thread: the server ends when the
    thread that started it does (prctl(2), PR_SET_PDEATHSIG).
    """

    #: What it is called in sentences.
    title: ClassVar[str]
    #: What the kernel calls its processes (proc(5), comm).
    commands: ClassVar[frozenset[str]]
    #: From the gentlest to the one that can't fail.
    stop_signals: ClassVar[tuple[signal.Signals, ...]]
    #: What it gets when we end, killed or not.
    death_signal: ClassVar[signal.Signals]

    def __init__(self, directory: Path, port: int | None) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"  # where it works
        self.log = self.directory / "log"  # of the current run
        self.port = port or free_port()  # `start` may change it
        self._process: subprocess.Popen[bytes] | None = None  # set while it runs

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    @abstractmethod
    async def start(self) -> None:
        """Start and wait until ready; raises EmbeddedFailed."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Say whether the server is ready; may block for a second."""

    async def stop(self) -> None:
        """End the sessions and stop; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        for step in self.stop_signals:
            process.send_signal(step)  # harmless once it ended
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
            return
        await asyncio.to_thread(process.wait)

    async def restart(self) -> None:
        """Stop and start on the same port and data."""
        await self.stop()
        await self.start()

    async def wait_ended(self) -> int:
        """Return the server's exit status once it ended by itself."""
        process = self._process
        if process is None:
            raise EmbeddedFailed(f"{self.title} was not started")
        return await asyncio.to_thread(process.wait)

    async def _prepare(self) -> None:
        """Make the directory, end what a killed run left, settle the port."""
        self._own(self.directory)
        await self._stop_leftovers()
        if not is_free(self.port):
            self.port = free_port()

    def _spawn(
        self, command: Sequence[str], *, cwd: Path, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        # Not asyncio's: a Popen belongs to no loop, so one loop may start the
        # server and another one stop it.
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env=environment(),
                # A Ctrl-C in the terminal is ours to act on.
                start_new_session=True,
            )

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not await asyncio.to_thread(self.is_ready):
            if self.pid is None:
                self._process = None
                raise EmbeddedFailed(
                    f"{self.title} ended while starting: {tail(self.log.read_bytes())}"
                )
            if time.monotonic() > deadline:
                await self.stop()
                raise EmbeddedFailed(
                    f"{self.title} was not ready in {START_TIMEOUT:.0f} s"
                )
            await asyncio.sleep(POLL_INTERVAL)

    async def _stop_leftovers(self) -> None:
        """Stop what still runs on our data directory, and on no other."""
        left = list(self._left())
        for step in dict.fromkeys((*self.stop_signals, signal.SIGKILL)):
            # A postmaster ends its children; without one each ends by itself.
            for pid in left:
                _signal(pid, step)
            deadline = time.monotonic() + STOP_TIMEOUT
            while left and time.monotonic() < deadline:
                await asyncio.sleep(POLL_INTERVAL)
                left = list(self._left())
            if not left:
                return

    def _left(self) -> Iterator[int]:
        """Yield the server's processes that work in the data directory.

        Asking the kernel tells a living one from another process that got its
        old pid.
        """
        proc = Path("/proc")
        for process in proc.iterdir() if proc.is_dir() else ():
            if not process.name.isdigit():
                continue
            try:
                command = (process / "comm").read_text().rstrip("\n")
                if command in self.commands and (
                    os.readlink(process / "cwd") == os.path.realpath(self.data)
                ):
                    yield int(process.name)
            except OSError:
                continue  # it ended meanwhile, or is another user's

    def _own(self, path: Path) -> None:
        """Make `path` private to the user that the server runs as."""
        if path == self.directory:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            user = self._user()
            os.chown(path, user.pw_uid, user.pw_gid)

    def _user(self) -> pwd.struct_passwd:
        """Return whom the server runs as when we are root: whoever owns the data.

        So a state directory that was made by another user stays that user's.
        """
        owner = self.directory.stat().st_uid
        return pwd.getpwuid(owner) if owner else pwd.getpwnam(UNPRIVILEGED_USER)

    def _launcher(self, binaries: Path) -> list[str]:
        """Return what goes before a command so that it runs as it should.

        PR_SET_PDEATHSIG ends the server with us, even when we are killed. As root
        the command runs as `nobody`, who may be unable to walk to the state
        directory or the binaries (a home of mode 700). Then CAP_DAC_OVERRIDE
        goes along, and no_setuid_fixup so that access(2), which Postgres asks
        about its own binary, honours it too (capabilities(7), access(2)).
        """
        if sys.platform != "linux":
            if os.geteuid() == 0:
                raise EmbeddedFailed(
                    f"{self.title} can't run as root: use another user"
                )
            return []
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise EmbeddedFailed("setpriv is missing: install the package util-linux")
        name = self.death_signal.name.removeprefix("SIG")
        launcher = [setpriv, "--pdeathsig", name]
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


def environment() -> dict[str, str]:
    """Return a small environment: none of our secrets, no PG* of the caller."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def tail(output: bytes) -> str:
    """Return the last lines of a log on one line."""
    lines = output.decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-5:]) or "it said nothing"


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


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile, which is what was wanted
