"""EmbeddedMongo: a MongoDB-wire server of our own, where its package is installed.

SecantusDB (GPL-2.0) is a program that is run beside us and never imported: it is in
no extra but its own. Owns how it is asked to run and when it is ready; knows no
document. How the process starts and ends is `child`'s. It asks for no password, so
it is for demos and tests on loopback.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
import struct
import sys
from pathlib import Path

from ogelproxy.child import LOOPBACK, Child
from ogelproxy.errors import EmbeddedFailed

PACKAGE = "secantus"
CACHE_SIZE = "64M"

#: OP_MSG (MongoDB's wire protocol): its opcode, and a section of one document.
OP_MSG = 2013
#: ``{"hello": 1, "$db": "admin"}`` in BSON (bsonspec.org).
HELLO = b"\x10hello\0\1\0\0\0" + b"\x02$db\0\6\0\0\0admin\0" + b"\0"
#: What the answer of a server that takes writes holds.
WRITABLE = b"\x08isWritablePrimary\0\1"


def is_installed() -> bool:
    """Say whether there is a server to run."""
    return importlib.util.find_spec(PACKAGE) is not None


class EmbeddedMongo(Child):
    """One server on loopback whose files and log lie below `directory`."""

    title = "MongoDB"
    # It runs as `python -m`; its directory tells it from other Pythons.
    commands = frozenset({Path(sys.executable).name})
    # Killed while it makes a collection, it can't read its files any more.
    stop_signals = (signal.SIGTERM, signal.SIGKILL)
    death_signal = signal.SIGTERM

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        super().__init__(directory, port)

    def url(self, database: str) -> str:
        """Return the URL of a database, without a password: there is none."""
        return f"mongodb://{LOOPBACK}:{self.port}/{database}"

    async def start(self) -> None:
        """Start and wait until it takes writes.

        One that a killed run left on this directory is stopped first. Raises
        EmbeddedFailed with the end of its log, or when it isn't installed.
        """
        await self._prepare()
        self.launch()
        await self._wait_ready()

    def launch(self) -> None:
        """Start without waiting for it, on the port as it is.

        Raises EmbeddedFailed when it isn't installed.
        """
        if not is_installed():
            raise EmbeddedFailed(
                "no MongoDB-wire server: pip install 'ogelproxy[mongodb-embedded]'"
            )
        self._own(self.directory)
        self.data.mkdir(mode=0o700, exist_ok=True)
        self._own(self.data)
        python = Path(sys.executable)
        self._process = self._spawn(
            [
                *self._launcher(python.parent),
                *(sys.executable, "-I", "-m", PACKAGE),
                *("--host", LOOPBACK, "--port", str(self.port)),
                *("--storage-path", str(self.data), "--cache-size", CACHE_SIZE),
                # Else a killed one forgets what it acknowledged.
                *("--sync-on-commit", "--log-level", "WARNING"),
            ],
            cwd=self.data,
        )

    def is_ready(self) -> bool:
        """Say whether it says that it takes writes."""
        document = struct.pack("<i", len(HELLO) + 4) + HELLO
        body = struct.pack("<iB", 0, 0) + document
        header = struct.pack("<4i", 16 + len(body), 1, 0, OP_MSG)
        try:
            with socket.create_connection((LOOPBACK, self.port), 1.0) as probe:
                probe.sendall(header + body)
                reader = probe.makefile("rb")
                (size,) = struct.unpack_from("<i", reader.read(16).ljust(4, b"\0"))
                return WRITABLE in reader.read(max(0, min(size, 65536) - 16))
        except OSError:
            return False
