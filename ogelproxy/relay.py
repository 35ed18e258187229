"""Relay: what leaves the fast path, for all clients and servers of an engine.

The compiled side calls it for errors, endings, timeouts and crashes; it is the
one place that knows every client and why each connection ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from ogelproxy import flights, sessions
from ogelproxy._connection import Connection
from ogelproxy._reactor import Reactor
from ogelproxy.cancel import Cancels
from ogelproxy.client import Client
from ogelproxy.config import Config
from ogelproxy.errors import (
    Draining,
    IdleInTransactionTimeout,
    IdleTimeout,
    InternalError,
    NotSupported,
    OgelError,
    ProtocolViolation,
    QueryTimeout,
    ServerLost,
    SessionLost,
)
from ogelproxy.protocol import messages, sql
from ogelproxy.server import MISLEADING, Server, misleading

if TYPE_CHECKING:
    from ogelproxy.console.tenant import Views
    from ogelproxy.gate import Gate
    from ogelproxy.limiter import Limiter
    from ogelproxy.listen import Channels
    from ogelproxy.metrics import Metrics
    from ogelproxy.pool import Pool
    from ogelproxy.tenants.model import Tenant

log = logging.getLogger(__name__)

#: A statement's name on servers.
SERVER_NAME = re.compile(rb"\bo7s_\d+\b")
#: Seconds that a client which was told why it ends may take to close.
LINGER = 2.0
#: Seconds that Postgres may take to end a session that was closed.
PARTING_TIMEOUT = 10.0


class Tenants(Protocol):
    """Where tenant records come from: a Directory, or an embedder's own.

    A record is kept while somebody holds its handle.
    """

    async def find(self, handle: str) -> Tenant | None: ...

    async def refresh(self, handle: str) -> Tenant | None: ...

    def peek(self, handle: str) -> Tenant | None: ...

    def hold(self, handle: str) -> None: ...

    def release(self, handle: str) -> None: ...


class Relay:
    """The host of an engine's compiled connections."""

    def __init__(
        self,
        config: Config,
        *,
        loop: asyncio.AbstractEventLoop,
        gate: Gate,
        limiter: Limiter,
        tenants: Tenants,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.reactor = Reactor(loop, self.crashed)
        self.cancels = Cancels()
        self.metrics = metrics
        self.transaction_wait = config.limits.transaction_wait
        self.reset_message = messages.query(config.pool.reset_query)
        self.transaction_refused = messages.error_response(
            NotSupported("a transaction block in statement mode"), is_fatal=False
        )
        self.listen_refused = messages.error_response(
            NotSupported(
                "LISTEN or UNLISTEN inside a transaction, or beside other statements, "
                "in this pool mode",
                hint="send it alone, or use a database in session mode",
            ),
            is_fatal=False,
        )
        self.misleading_statuses = frozenset(
            f"{name}\0{value}\0".encode() for name, value in MISLEADING
        )
        self.server_lost_message = messages.error_response(ServerLost())
        # Makes what answers a client's `SHOW o7s.…`; replaced by the engine.
        self.views: Callable[[], Views]
        # Makes what the clients of a pool listen to; replaced by the engine.
        self.channels: Callable[[Pool], Channels]
        self.clients: dict[str, set[Client]] = {}
        self.client_count = 0
        self.pinned_count = 0
        self.moved_count = 0  # servers closed for others, ever
        self._gate = gate
        self._limiter = limiter
        self._tenants = tenants
        self._tasks: set[asyncio.Task[Any]] = set()

    # Tasks: everything that is started is held, and its failure logged.

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        self.begin(work)

    def begin(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        task = self.reactor.loop.create_task(work)
        self.reactor.leave()
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task failed", exc_info=task.exception())

    async def stop(self) -> None:
        """End every connection and task."""
        for connection in self.reactor.connections:
            if not isinstance(connection, Client):
                continue
            if connection.is_logging_in:
                connection.close()
            else:
                connection.abort()
        for connection in self.reactor.connections:
            if isinstance(connection, Server):
                self.retire(connection)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.reactor.stop()

    def reload(self, config: Config) -> None:
        self.config = config
        self.transaction_wait = config.limits.transaction_wait
        self.reset_message = messages.query(config.pool.reset_query)

    # Clients.

    def enter(self, client: Client) -> None:
        """Begin to carry a client that has logged in."""
        self.clients.setdefault(client.session.handle, set()).add(client)
        client.pool.client_count += 1
        self.client_count += 1
        self._tenants.hold(client.session.handle)

    def client_closed(self, client: Client) -> None:
        session = client.session
        members = self.clients.get(session.handle)
        if members is None or client not in members:
            return
        members.discard(client)
        if not members:
            del self.clients[session.handle]
        self.client_count -= 1
        client.pool.client_count -= 1
        if client.has_listened:
            client.pool.channels.gone(client)
        if session.is_replication:
            client.pool.retire_all()
        self.pinned_count -= bool(client.held_by)
        self.cancels.withdraw(session.process_id)
        self._gate.leave(session.admission)
        self._tenants.release(session.handle)

    def fail(self, client: Client, error: OgelError) -> None:
        """Refuse a client that is logged in, and end it."""
        self.metrics.refused(error)
        client.fail(messages.error_response(error))

    def fail_all(self, handle: str, error: OgelError) -> None:
        for client in list(self.clients.get(handle, ())):
            self.fail(client, error)

    def lexer_changed(self, client: Client) -> None:
        """End a client that made strings end elsewhere than the limiter thinks."""
        self.fail(client, misleading())

    # Answers that the compiled side asks for.

    def error(self, error: OgelError) -> bytes:
        self.metrics.refused(error)
        return messages.error_response(error, is_fatal=False)

    def refusal(self, client: Client, count: int, is_fatal: bool) -> bytes:
        """The ErrorResponse for a query that the limiter refused."""
        error = self._rate_limited(client)
        self.metrics.refused(error)
        return messages.error_response(error, is_fatal=is_fatal)

    def warning(self, client: Client, count: int) -> bytes:
        """The NoticeResponse for a query that would have been refused."""
        return messages.notice_response(self._rate_limited(client))

    def _rate_limited(self, client: Client) -> OgelError:
        tenant = self._tenants.peek(client.session.handle)
        assert tenant is not None  # held while it has clients
        return self._limiter.refusal(client.bucket, tenant, client.wait)

    def reworded(
        self, client: Client, body: bytes, replaced: list[sql.Replaced] | None
    ) -> bytes:
        """An ErrorResponse in the client's terms, from a server's body.

        Names that the proxy gave statements become the client's, and places are
        those in the query before names in it were `replaced`.
        """
        names = {each.server_name: each.name for each in replaced or ()}

        def name(match: re.Match[bytes]) -> bytes:
            return names.get(match[0]) or client.name_of(match[0]) or match[0]

        fields = []
        for field in body.split(b"\0"):
            if field[:1] == b"P" and field[1:].isdigit():
                position = int(field[1:])
                for each in replaced or ():
                    if position > each.position:
                        position = max(position - each.growth, each.position)
                field = b"P%d" % position
            elif field[:1] in b"MDHWq":
                field = SERVER_NAME.sub(name, field)
            fields.append(field)
        return messages.message(b"E", b"\0".join(fields))

    def settings_refused(self, client: Client, body: bytes) -> None:
        """End a client whose settings no server takes any more."""
        fields = messages.read_fields(body)
        error = SessionLost(f"{fields.get('C')} {fields.get('M')}")
        log.warning("%s", error, extra={"tenant": client.session.handle})
        self.fail(client, error)

    def pinned(self, client: Client, before: int) -> None:
        """The client's reasons for keeping its server have changed."""
        self.pinned_count += bool(client.held_by) - bool(before)
        if not before:
            client.pinned_at = datetime.now(UTC)
        added = sessions.reasons(client.held_by & ~before)
        for reason in added:
            self.metrics.pinned(reason)
        level = dict(client.settings.items).get("client_min_messages", "")
        if level.startswith("debug"):
            pins = ", ".join(sessions.reasons(client.held_by))
            text = f"pinned to its server connection: {pins}" if pins else "not pinned"
            client.send(messages.debug_response(text))

    def statement_unknown(self, name: bytes) -> bytes:
        text = (
            f'prepared statement "{name.decode(errors="replace")}" does not exist'
            if name
            else "unnamed prepared statement does not exist"
        )
        return messages.plain_error("26000", text)

    def statement_exists(self, name: bytes) -> bytes:
        text = f'prepared statement "{name.decode(errors="replace")}" already exists'
        return messages.plain_error("42P05", text)

    # Servers.

    def server_lost(self, server: Server) -> None:
        """The server closed the connection, or broke the protocol."""
        log.info("server connection lost", extra={"tenant": server.pool.handle})
        self._close_server(server)

    def retire(self, server: Server) -> None:
        """End a server connection that nobody uses."""
        if not server.is_closed:
            server.send(messages.TERMINATE)
        self._close_server(server)

    def hand_over(self, server: Server) -> None:
        """End a server connection so that another pool may have its place."""
        self.moved_count += 1
        self.retire(server)

    def abandon(self, server: Server, is_busy: bool) -> None:
        """End a server connection whose client left it half-way.

        What it runs is cancelled first: Postgres would notice the closed
        socket only when it next writes.
        """
        if is_busy:
            self.spawn(self._cancel_and_retire(server))
        else:
            self.retire(server)

    async def _cancel_and_retire(self, server: Server) -> None:
        server.is_retiring = True
        try:
            await self.cancels.cancel_server(server)
        finally:
            self.retire(server)

    def _close_server(self, server: Server) -> None:
        if server.is_closed:
            return
        pool = server.pool
        pool.withdraw(server)
        pool.size -= 1
        pool.allotment.part()
        self.see_off(server)
        if pool.waiting_count:
            pool.wanted()

    def see_off(self, server: Server) -> None:
        """Close a server's descriptor; what it counts for lasts as long as Postgres."""
        try:
            remains = socket.socket(fileno=os.dup(server.fd))
        except OSError:
            # No descriptors are left: it has to count as ended.
            server.close()
            self.reactor.loop.call_soon(self.seen_off, server)
            return

        def ended(_: object) -> None:
            remains.close()
            self.seen_off(server)

        server.close()
        # Also when it is cancelled before its first step.
        self.begin(self._ending(remains)).add_done_callback(ended)

    async def _ending(self, remains: socket.socket) -> None:
        """Wait until the server has closed its side, which Postgres does last."""
        with contextlib.suppress(OSError, TimeoutError):
            remains.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(PARTING_TIMEOUT):
                while await self.reactor.loop.sock_recv(remains, 65_536):
                    pass

    def seen_off(self, server: Server) -> None:
        """Postgres has ended the session: nothing of it counts any more."""
        server.land()
        server.pool.allotment.parted()

    # Faults.

    def crashed(self, connection: Connection, error: Exception) -> None:
        """Compiled code raised while it served `connection`."""
        if isinstance(error, ProtocolViolation) and error.by == "client":
            log.info("%s", error)
        else:
            if not isinstance(error, OgelError):
                known, error = error, InternalError(f"{type(error).__name__}: {error}")
                log.error("%s", error, exc_info=known)
            else:
                log.error("%s", error)
        if isinstance(connection, Client):
            self._crashed_client(connection, error)
        elif isinstance(connection, Server):
            connection.lose()

    def _crashed_client(self, client: Client, error: OgelError) -> None:
        if client.is_logging_in:
            client.close()
        else:
            if client.server is not None:
                # What was on its way there is lost, perhaps half a message.
                client.server.is_retiring = True
            self.fail(client, error)

    # Time.

    def sweep(self, now: float) -> None:
        """End clients that took longer than they may."""
        limits = self.config.client
        for connection in self.reactor.connections:
            if not isinstance(connection, Client) or connection.is_logging_in:
                continue
            silent = now - connection.active_at
            if connection.is_lingering:
                if silent > LINGER:
                    connection.abort()
            elif connection.is_crowded:
                self._sweep_crowded(connection, now - connection.waiting_since)
            elif connection.is_waiting:
                pass
            elif connection.server is not None and connection.server.owed:
                is_query = not connection.session.is_replication
                if is_query and 0 < limits.query_timeout < silent:
                    self.fail(connection, QueryTimeout())
            elif connection.is_in_transaction:
                if 0 < limits.idle_in_transaction_timeout < silent:
                    self.fail(connection, IdleInTransactionTimeout())
            elif 0 < limits.idle_timeout < silent:
                self.fail(connection, IdleTimeout())

    def _sweep_crowded(self, client: Client, waited: float) -> None:
        if waited > self.config.pool.queue_timeout:
            tenant = self._tenants.peek(client.session.handle)
            client.give_up(self.error(flights.refusal(tenant, waited)))

    async def drain(
        self, grace: float, is_coming: Callable[[], bool] = lambda: False
    ) -> None:
        """Tell idle clients to go, let the others finish; bounded in time.

        It is not the end while somebody `is_coming`: logs in yet.
        """
        end = self.reactor.loop.time() + grace
        while self.client_count or is_coming():
            late = self.reactor.loop.time() >= end
            for members in list(self.clients.values()):
                for client in list(members):
                    # A stream of changes never ends by itself.
                    if late or client.is_idle or client.session.is_replication:
                        self.fail(client, Draining())
            if late:
                break
            await asyncio.sleep(0.02)
