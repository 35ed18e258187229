"""Commands: what an operator may do to a running engine.

Verbs and their meaning are those of PgBouncer's console (its doc/usage.md). A database
is `organisation/name`, or its name alone where only one has a pool by that name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ogelproxy.console.portals import Refused
from ogelproxy.console.statements import Command, unknown
from ogelproxy.console.tables import name_of
from ogelproxy.errors import Draining, OgelError
from ogelproxy.server import Server
from ogelproxy.tenants.model import Target, Tenant

if TYPE_CHECKING:
    from ogelproxy.console.operator import Parts
    from ogelproxy.pool import Pool

log = logging.getLogger(__name__)

#: Seconds between looks at what a command waits for.
WAIT_INTERVAL = 0.02

#: Whether the operator who waits for a command has left.
IsGone = Callable[[], bool]


class Commands:
    """The commands of one engine; each raises Refused, or waits until it is done."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._verbs: dict[str, Callable[[Command, IsGone], Awaitable[None]]] = {
            "PAUSE": self._pause,
            "RESUME": self._resume,
            "RECONNECT": self._reconnect,
            "KILL": self._kill,
            "KILL_CLIENT": self._kill_client,
            "DISABLE": self._disable,
            "ENABLE": self._enable,
            "RELOAD": self._reload,
            "SHUTDOWN": self._shutdown,
            "WAIT_CLOSE": self._wait_close,
        }
        #: For HELP.
        self.forms = (
            ("PAUSE [db]", "lend no servers; done when all are given back and closed"),
            ("RESUME [db]", "undo PAUSE and KILL"),
            ("RECONNECT [db]", "replace servers as they are given back"),
            ("WAIT_CLOSE [db]", "wait until those that RECONNECT replaces are closed"),
            ("KILL [db]", "end clients and servers at once, and pause"),
            ("KILL_CLIENT id", "end one client"),
            ("DISABLE db", "refuse new connections"),
            ("ENABLE db", "undo DISABLE"),
            ("RELOAD", "read settings and certificates again"),
            ("SHUTDOWN", "end at once"),
            ("SHUTDOWN WAIT_FOR_SERVERS", "pause, and end when all servers are closed"),
            ("SHUTDOWN WAIT_FOR_CLIENTS", "end when all clients have left"),
        )

    def knows(self, verb: str) -> bool:
        return verb in self._verbs

    async def run(self, command: Command, is_gone: IsGone) -> None:
        """Run a command, for an operator who may leave meanwhile."""
        log.info("console: %s", " ".join((command.verb, *command.words)))
        await self._verbs[command.verb](command, is_gone)

    async def _find(self, name: str) -> tuple[Tenant, Target]:
        """Return the database of this name. Raises Refused."""
        handle, slash, database = name.partition("/")
        if not slash:
            named = {
                pool.target.id: pool
                for pool in self._parts.router.pools
                if pool.target.name == name
            }
            if len(named) > 1:
                shown = ", ".join(sorted(map(name_of, named.values()))[:5])
                raise Refused("42725", f"several databases are called {name}: {shown}")
            if not named:
                raise _no_database(name)
            handle, database = named.popitem()[1].handle, name
        try:
            tenant = await self._parts.tenants.find(handle)
        except OgelError as error:
            raise Refused(error.sqlstate, error.client_text) from None
        target = None if tenant is None else tenant.databases.get(database)
        if tenant is None or target is None:
            raise _no_database(name)
        return tenant, target

    async def _subject(self, command: Command) -> Target | None:
        """Return the database that a command names; None when it names none."""
        name = command.subject()
        if not name:
            return None
        tenant, target = await self._find(name)
        # So that it is seen in SHOW DATABASES, whoever has been there.
        self._parts.router.pool(tenant, target)
        return target

    async def _required(self, command: Command) -> Target:
        target = await self._subject(command)
        if target is None:
            raise Refused("42601", "a database is required")
        return target

    def _pools(self, target: Target | None) -> list[Pool]:
        router = self._parts.router
        return router.pools if target is None else router.pools_of(target.id)

    async def _pause(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        router = self._parts.router
        target_id = None if target is None else target.id
        if router.is_paused or (target_id and router.is_target_paused(target_id)):
            raise Refused("55000", "it is paused already")
        router.pause(target_id)
        await _until(lambda: self._is_empty(target), is_gone)

    def _is_empty(self, target: Target | None) -> bool:
        return not any(pool.size or pool.opening for pool in self._pools(target))

    async def _resume(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        router = self._parts.router
        if target is None:
            if not router.has_paused:
                raise Refused("55000", "nothing is paused")
            router.resume(None)
        else:
            if router.is_paused:
                raise Refused("55000", "all databases are paused", "use RESUME alone")
            if not router.is_target_paused(target.id):
                raise Refused("55000", f"database {command.subject()} is not paused")
            router.resume(target.id)

    async def _reconnect(self, command: Command, is_gone: IsGone) -> None:
        for pool in self._pools(await self._subject(command)):
            pool.retire_all()

    async def _wait_close(self, command: Command, is_gone: IsGone) -> None:
        pools = self._pools(await self._subject(command))

        def is_done() -> bool:
            return not any(
                isinstance(server, Server)
                and server.pool in pools
                and server.epoch != server.pool.epoch
                for server in self._parts.relay.reactor.connections
            )

        await _until(is_done, is_gone)

    async def _kill(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        self._parts.router.pause(None if target is None else target.id)
        relay = self._parts.relay
        for members in list(relay.clients.values()):
            for client in list(members):
                if target is None or client.session.target_id == target.id:
                    relay.fail(client, Draining())

    async def _kill_client(self, command: Command, is_gone: IsGone) -> None:
        number = command.subject()
        if not number.isascii() or not number.isdigit():
            raise Refused("22023", "the client's id is required, see SHOW CLIENTS")
        relay = self._parts.relay
        for members in relay.clients.values():
            for client in members:
                if client.session.process_id == int(number):
                    relay.fail(client, Draining())
                    return
        raise Refused("22023", f"there is no client {number}")

    async def _disable(self, command: Command, is_gone: IsGone) -> None:
        self._parts.router.disable((await self._required(command)).id)

    async def _enable(self, command: Command, is_gone: IsGone) -> None:
        self._parts.router.enable((await self._required(command)).id)

    async def _reload(self, command: Command, is_gone: IsGone) -> None:
        if command.words:
            raise unknown(command)
        try:
            await self._parts.reload()
        except (OgelError, OSError, TimeoutError) as error:
            log.error("not reloaded: %s", error)
            raise Refused("F0000", "not reloaded: the log says why") from None

    async def _shutdown(self, command: Command, is_gone: IsGone) -> None:
        mode, relay = command.subject().upper(), self._parts.relay
        match mode:
            case "":
                self._parts.stop_accepting()
                await relay.drain(0.0)
                self._parts.stop()
            case "WAIT_FOR_SERVERS":
                self._parts.stop_accepting()
                self._parts.router.pause(None)
                relay.spawn(self._stop_without_servers())
            case "WAIT_FOR_CLIENTS":
                self._parts.stop_accepting()
                relay.spawn(self._stop_without_clients())
            case _:
                raise unknown(command)

    async def _stop_without_servers(self) -> None:
        relay = self._parts.relay

        def is_done() -> bool:
            for pool in self._parts.router.pools:
                for client in pool.waiting_clients:
                    # It would wait for ever.
                    relay.fail(client, Draining())
            return self._is_empty(None)

        await _until(is_done)
        await relay.drain(0.0)
        self._parts.stop()

    async def _stop_without_clients(self) -> None:
        await _until(lambda: self._parts.relay.client_count == 0)
        self._parts.stop()


async def _until(is_done: Callable[[], bool], is_gone: IsGone = lambda: False) -> None:
    """Wait until something is done, or nobody waits for it any more."""
    while True:
        if is_done() or is_gone():
            return
        await asyncio.sleep(WAIT_INTERVAL)


def _no_database(name: str) -> Refused:
    return Refused("3D000", f"there is no database {name}", "see SHOW DATABASES")
