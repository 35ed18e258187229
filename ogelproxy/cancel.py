"""Cancel keys: ours to clients, and the servers' behind them.

A cancel request names a client by the key that we gave it; whatever server
that client holds at this moment is asked, with the server's own key. A server
is not lent again while a cancel request to it is under way, so that it can't
hit the next client.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from typing import TYPE_CHECKING

from ogelproxy._reactor import Connection
from ogelproxy.errors import TargetUnreachable
from ogelproxy.protocol import messages
from ogelproxy.server import ask_for_tls

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.server import Server

log = logging.getLogger(__name__)

#: Cancel requests on their way at once; more are dropped, as Postgres may.
MAX_UNDER_WAY = 256
CANCEL_TIMEOUT = 5.0

#: The minor version of protocol 3 from which on keys may be long (manual 55.2.9).
LONG_KEYS_MINOR = 2

#: What Postgres says, for a query that had not reached it yet.
CANCELED = messages.plain_error("57014", "canceling statement due to user request")


class Cancels:
    """The cancel keys of the clients of one engine."""

    def __init__(self) -> None:
        self._clients: dict[int, tuple[bytes, Client]] = {}
        self._under_way = 0

    def __len__(self) -> int:
        return len(self._clients)

    def issue(self, client: Client, minor: int) -> tuple[int, bytes]:
        """Make a key for `client`, which speaks protocol 3.`minor`.

        That is a process id and secret bytes: 4, or 32 as Postgres 18 makes them.
        """
        while True:
            process_id = secrets.randbelow(2**31 - 1) + 1
            if process_id not in self._clients:
                break
        secret = secrets.token_bytes(4 if minor < LONG_KEYS_MINOR else 32)
        self._clients[process_id] = (secret, client)
        return process_id, secret

    def withdraw(self, process_id: int) -> None:
        self._clients.pop(process_id, None)

    async def cancel(self, process_id: int, secret: bytes) -> None:
        """Pass a client's cancel request on; an unknown key does nothing."""
        known, client = self._clients.get(process_id, (b"", None))
        if not hmac.compare_digest(known, secret) or client is None:
            return
        server = client.server
        if client.is_waiting:
            client.give_up(CANCELED)
        elif server is not None and server.owed:
            await self.cancel_server(server)

    async def cancel_server(self, server: Server) -> None:
        """Ask the server's Postgres to cancel what it runs."""
        if self._under_way >= MAX_UNDER_WAY or not server.cancel_key:
            return
        self._under_way += 1
        server.cancels += 1
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT):
                await self._send(server)
        except (OSError, TimeoutError, TargetUnreachable) as error:
            # The signal may still come, and must not hit another client.
            server.is_retiring = True
            log.warning("cancel request failed: %s", error)
        finally:
            self._under_way -= 1
            server.cancel_done()

    async def _send(self, server: Server) -> None:
        address = server.pool.address
        sock = await address.connect()
        connection = Connection(server.reactor, sock.detach())
        try:
            # Who reads the key could cancel too: as secret as the login was.
            context = address.tls_context() if server.tls is not None else None
            if context is not None:
                await ask_for_tls(connection, address, context, may_do_without=False)
            connection.send(
                messages.cancel_request(server.process_id, server.cancel_key)
            )
            # Postgres closes once the signal is sent; only then is it safe to
            # lend the server again (manual 55.2.9).
            with contextlib.suppress(ConnectionResetError):
                while True:
                    await connection.more()
                    connection.take(len(connection.peek()))
        finally:
            connection.close()
