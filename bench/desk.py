"""Desk: a client and a server of the data plane, without a network or a Postgres.

Real sockets, whose far ends are held here, so that what is measured is what runs.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from uuid import UUID

from ogelproxy._bucket import TokenBucket
from ogelproxy._client import ClientCore
from ogelproxy._extended import ExtendedClient
from ogelproxy._flights import Flights
from ogelproxy._pool import PoolCore
from ogelproxy._reactor import Reactor
from ogelproxy._server import ServerCore
from ogelproxy._traffic import Traffic
from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.usage.spool import Spool

#: As `PoolCore` numbers them (`_pool.pxd`).
TRANSACTION = 1
#: Far above what any loop takes: the bucket is asked, and always has it.
UNLIMITED = 1e12
MAX_ROWS = 4096
SPOOL_BYTES = 1 << 26
MAX_STATEMENT_BYTES = 1 << 20
MAX_PREPARED = 100


class Desk:
    """Everything that a query passes, and one usage batch in a file.

    ``with Desk() as desk`` opens it; a crash of the data plane is raised.
    """

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        loop = asyncio.new_event_loop()
        self._stack.callback(loop.close)
        self.reactor = Reactor(loop, self._crashed)
        self._stack.callback(self.reactor.stop)
        self.pool = PoolCore(TRANSACTION, MAX_STATEMENT_BYTES, MAX_PREPARED)
        self.host = SimpleNamespace(misleading_statuses=frozenset())
        self.usage = UsageTable(MAX_ROWS)
        spool = Spool(directory, SPOOL_BYTES, self.usage.file_bytes)
        spool.open()
        self._stack.callback(spool.close)
        self.usage.rotate(spool.open_batch())
        self._stack.callback(self.usage.close)
        self.traffic = Traffic("bench", "postgres")
        self.bucket = TokenBucket(UNLIMITED, UNLIMITED, 0.0)
        self.who = Attribution(
            self.usage,
            UUID(int=1).bytes,
            handle="org_bench",
            database="app",
            database_type="postgres",
            tier="enterprise",
            application_name="bench",
            work_mem_bytes=4 << 20,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.reactor.connections:
            connection.close()
        self._stack.close()

    def client(
        self, kind: type[ClientCore] = ExtendedClient
    ) -> tuple[Any, socket.socket]:
        """Return a client that is logged in, and the far end of its socket."""
        near, far = self._socket()
        client: Any = kind(self.reactor, near)
        client.start(
            self.host,
            self.pool,
            self.pool.baseline,
            self.bucket,
            self.who,
            self.usage,
            self.traffic,
            Flights(),
        )
        return client, far

    def server(self, kind: type[ServerCore] = ServerCore) -> tuple[Any, socket.socket]:
        """Return a server that is logged in, and the far end of its socket."""
        near, far = self._socket()
        server: Any = kind(self.reactor, near, self.host, self.pool)
        return server, far

    def _socket(self) -> tuple[int, socket.socket]:
        near, far = socket.socketpair()
        self._stack.callback(far.close)
        near.setblocking(False)
        return near.detach(), far

    def _crashed(self, _: object, error: Exception) -> None:
        raise error
