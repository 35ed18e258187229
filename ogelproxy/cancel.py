"""Cancel keys: ours to clients, and the servers' behind them.

A cancel request names a client by the key that we gave it; whatever server
that client holds at this moment is asked, with the server's own key. A server
is not lent again while a cancel request to it is under way, so that it can't
hit the next client. Who owns a key can't be told from it: one that is unknown here
is asked for among the neighbours, the machine's other workers and other machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import orjson

from ogelproxy import keys
from ogelproxy._connection import Connection
from ogelproxy.config import MAX_WORKERS
from ogelproxy.errors import LineFailed, RedisUnavailable, TargetUnreachable
from ogelproxy.line import Line
from ogelproxy.protocol import messages
from ogelproxy.redis import Redis
from ogelproxy.server import ask_for_tls

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.server import Server

log = logging.getLogger(__name__)

#: Cancel requests on their way at once; more are dropped, as Postgres may.
MAX_UNDER_WAY = 256
CANCEL_TIMEOUT = 5.0

#: Unknown keys that are asked for elsewhere at once, and those per second that all
#: other machines are told of; more of these are dropped.
MAX_ASKED = 32
MAX_TOLD_PER_SECOND = 100

#: The minor version of protocol 3 from which on keys may be long (manual 55.2.9).
LONG_KEYS_MINOR = 2

#: What Postgres says, for a query that had not reached it yet.
CANCELED = messages.plain_error("57014", "canceling statement due to user request")


class Cancels:
    """The cancel keys of the clients of one engine."""

    def __init__(self) -> None:
        #: Of this process among those of the machine, from 1; set by the engine.
        self.place: int | None = None
        #: Asks whoever else may know a key; replaced by Neighbours.
        self.elsewhere: Callable[[int, bytes], Awaitable[None]] | None = None
        self._clients: dict[int, tuple[bytes, Client]] = {}
        self._under_way = 0
        self._asking = asyncio.Semaphore(MAX_ASKED)

    def __len__(self) -> int:
        return len(self._clients)

    def issue(self, client: Client, minor: int) -> tuple[int, bytes]:
        """Make a key for `client`, which speaks protocol 3.`minor`.

        That is a process id and secret bytes: 4, or 32 as Postgres 18 makes them.
        """
        size = 4 if minor < LONG_KEYS_MINOR else 32
        while True:
            drawn = secrets.token_bytes(4 + size)
            process_id = int.from_bytes(drawn[:4], "big") % (2**31 - 1) + 1
            if self.place is not None:
                # No two workers of a machine give the same.
                process_id = max(process_id - process_id % MAX_WORKERS, MAX_WORKERS)
                process_id += self.place - 1
            if process_id not in self._clients:
                break
        secret = drawn[4:]
        self._clients[process_id] = (secret, client)
        return process_id, secret

    def withdraw(self, process_id: int) -> None:
        self._clients.pop(process_id, None)

    async def cancel(self, process_id: int, secret: bytes) -> None:
        """Pass a client's cancel request on; a key that nobody knows does nothing."""
        if self.knows(process_id, secret):
            await self.cancel_here(process_id, secret)
        elif self.elsewhere is not None:
            # Anybody may send any number of made-up keys: they wait for each other.
            async with self._asking:
                await self.elsewhere(process_id, secret)

    def knows(self, process_id: int, secret: bytes) -> bool:
        """Say whether this is the key of a client that is here."""
        known, client = self._clients.get(process_id, (b"", None))
        return hmac.compare_digest(known, secret) and client is not None

    async def cancel_here(self, process_id: int, secret: bytes) -> bool:
        """Cancel for a key that may be one of ours; say whether it is."""
        if not self.knows(process_id, secret):
            return False
        _, client = self._clients[process_id]
        server = client.server
        if client.is_waiting:
            client.give_up(CANCELED)
        elif server is not None and server.owed:
            await self.cancel_server(server)
        return True

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


class Neighbours:
    """Whoever else may know a key: other workers, by `line`, and other machines.

    These are told over Redis, a channel that only proxies may read: who reads it
    could cancel what the keys are for.
    """

    def __init__(
        self,
        cancels: Cancels,
        *,
        line: Line | None,
        redis: Redis | None,
        spawn: Callable[[Coroutine[Any, Any, object]], None],
        clock: Callable[[], float],
    ) -> None:
        self._cancels = cancels
        self._line = line
        self._redis = redis
        self._spawn = spawn
        self._clock = clock
        self._second = 0  # by `clock`, in which keys were told last
        self._told_count = 0  # keys told in it
        if line is not None or redis is not None:
            cancels.elsewhere = self.cancel
        if line is not None:
            line.on("cancel", self._asked)
        if redis is not None:
            redis.hear(keys.CANCELS, self._heard)

    async def cancel(self, process_id: int, secret: bytes) -> None:
        """Have somebody else cancel; returns when it is done, or out of our hands."""
        key = {"process_id": process_id, "secret": secret.hex()}
        try:
            if self._line is not None and await self._line.ask(
                "cancel", key, answer_timeout=CANCEL_TIMEOUT
            ):
                return
        except (LineFailed, TimeoutError) as error:
            log.warning("a cancel request was not passed on: %s", error)
        if self._redis is not None and self._may_tell():
            try:
                await self._redis.say(keys.CANCELS, orjson.dumps(key))
            except RedisUnavailable as error:
                log.warning("a cancel request was not passed on: %s", error)

    def _may_tell(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._told_count = second, 0
        self._told_count += 1
        return self._told_count <= MAX_TOLD_PER_SECOND

    def _asked(self, key: dict[str, Any]) -> Coroutine[Any, Any, bool]:
        return self._cancels.cancel_here(*_read(key))

    def _heard(self, message: bytes) -> None:
        process_id, secret = _read(orjson.loads(message))
        if self._cancels.knows(process_id, secret):
            self._spawn(self._cancels.cancel_here(process_id, secret))


def _read(key: dict[str, Any]) -> tuple[int, bytes]:
    return key["process_id"], bytes.fromhex(key["secret"])
