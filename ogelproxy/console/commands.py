"""Commands: what an operator may do to a running engine.

Verbs and their meaning are those of PgBouncer's console (its doc/usage.md). A database
is `organisation/name`, or its name alone where only one has a pool by that name.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ogelproxy.console.portals import Refused
from ogelproxy.console.statements import Command, unknown
from ogelproxy.errors import Draining, LineFailed, OgelError
from ogelproxy.server import Server
from ogelproxy.tenants.model import Target, Tenant

if TYPE_CHECKING:
    from ogelproxy.console.operator import Parts
    from ogelproxy.console.tables import Tables
    from ogelproxy.pool import Pool

log = logging.getLogger(__name__)

#: Seconds between looks at what a command waits for.
WAIT_INTERVAL = 0.02
#: Seconds after which a worker that waits says that it still does.
LONGEST_WAIT = 1.0

#: Whether the operator who waits for a command has left.
IsGone = Callable[[], bool]


class Commands:
    """The commands of one engine; each raises Refused, or waits until it is done."""

    def __init__(self, parts: Parts, tables: Tables) -> None:
        self._parts = parts
        self._tables = tables
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

        # What each worker does of them; targets are told by their ids.
        for what, act in (
            ("empty", self._wait_empty),
            ("closed", self._wait_closed),
            ("reconnect", self._reconnect_here),
            ("kill", self._kill_here),
            ("kill_client", self._kill_client_here),
        ):
            parts.peers.add_act(what, act)

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
            rows, _ = await self._tables.rows("databases")
            named = [row[0] for row in rows if row[0].partition("/")[2] == name]
            if len(named) > 1:
                shown = ", ".join(sorted(named)[:5])
                raise Refused("42725", f"several databases are called {name}: {shown}")
            if not named:
                raise _no_database(name)
            handle, _, database = named[0].partition("/")
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

    async def _order(self, command: Command, target: Target | None) -> None:
        """Have all workers obey, now and later. Raises Refused."""
        target_id = None if target is None else target.id
        peers = self._parts.peers
        if not peers.has_others:
            orders = self._parts.router.orders
            refused = orders.change(command.verb, target_id)
            self._parts.router.obey(orders)
            silent: list[str] = []
        else:
            body = (command.verb, None if target_id is None else str(target_id))
            try:
                answer = await peers.tell("order", body)
            except (LineFailed, TimeoutError) as error:
                raise _not_done([f"the supervisor: {error or 'no answer'}"]) from None
            refused, silent = answer["refused"], answer["silent"]
        if refused:
            raise Refused("55000", refused)
        if silent:
            raise _not_done(silent)

    async def _everywhere(self, what: str, about: Any) -> list[Any]:
        """Have all workers do something at once. Raises Refused."""
        heard = await self._parts.peers.act(what, about)
        if heard.silent:
            raise _not_done(heard.silent)
        return heard.answers

    async def _wait(self, what: str, target: Target | None, is_gone: IsGone) -> None:
        """Wait until all workers are done, or the operator has left."""
        about = None if target is None else str(target.id)
        while not is_gone():
            heard = await self._parts.peers.act(
                what, about, answer_timeout=2 * LONGEST_WAIT
            )
            if heard.silent:
                raise _not_done(heard.silent)
            if all(heard.answers):
                return

    def _pools(self, target_id: str | None) -> list[Pool]:
        router = self._parts.router
        return router.pools if target_id is None else router.pools_of(UUID(target_id))

    async def _pause(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        await self._order(command, target)
        await self._wait("empty", target, is_gone)

    async def _wait_empty(self, target_id: str | None) -> bool:
        return await _until(lambda: self._is_empty(target_id), LONGEST_WAIT)

    def _is_empty(self, target_id: str | None) -> bool:
        return not any(pool.size or pool.opening for pool in self._pools(target_id))

    async def _resume(self, command: Command, is_gone: IsGone) -> None:
        await self._order(command, await self._subject(command))

    async def _disable(self, command: Command, is_gone: IsGone) -> None:
        await self._order(command, await self._required(command))

    async def _enable(self, command: Command, is_gone: IsGone) -> None:
        await self._order(command, await self._required(command))

    async def _reconnect(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        await self._everywhere("reconnect", None if target is None else str(target.id))

    async def _reconnect_here(self, target_id: str | None) -> None:
        for pool in self._pools(target_id):
            pool.retire_all()

    async def _wait_close(self, command: Command, is_gone: IsGone) -> None:
        await self._wait("closed", await self._subject(command), is_gone)

    async def _wait_closed(self, target_id: str | None) -> bool:
        pools = self._pools(target_id)

        def is_done() -> bool:
            return not any(
                isinstance(server, Server)
                and server.pool in pools
                and server.epoch != server.pool.epoch
                for server in self._parts.relay.reactor.connections
            )

        return await _until(is_done, LONGEST_WAIT)

    async def _kill(self, command: Command, is_gone: IsGone) -> None:
        target = await self._subject(command)
        await self._order(command, target)
        await self._everywhere("kill", None if target is None else str(target.id))

    async def _kill_here(self, target_id: str | None) -> None:
        relay = self._parts.relay
        for members in list(relay.clients.values()):
            for client in list(members):
                if target_id is None or str(client.session.target_id) == target_id:
                    relay.fail(client, Draining())

    async def _kill_client(self, command: Command, is_gone: IsGone) -> None:
        number = command.subject()
        if not number.isascii() or not number.isdigit():
            raise Refused("22023", "the client's id is required, see SHOW CLIENTS")
        heard = await self._parts.peers.act("kill_client", number.lstrip("0"))
        if any(heard.answers):
            return
        if heard.silent:
            raise _not_done(heard.silent)
        raise Refused("22023", f"there is no client {number}")

    async def _kill_client_here(self, number: str) -> bool:
        relay = self._parts.relay
        for members in relay.clients.values():
            for client in members:
                if str(client.session.process_id) == number:
                    relay.fail(client, Draining())
                    return True
        return False

    async def _reload(self, command: Command, is_gone: IsGone) -> None:
        if command.words:
            raise unknown(command)
        try:
            await self._parts.reload()
        except (OgelError, OSError, TimeoutError) as error:
            log.error("not reloaded: %s", error)
            raise Refused("F0000", "not reloaded: the log says why") from None

    async def _shutdown(self, command: Command, is_gone: IsGone) -> None:
        mode = command.subject().upper()
        if mode not in ("", "WAIT_FOR_SERVERS", "WAIT_FOR_CLIENTS"):
            raise unknown(command)
        if not self._parts.peers.has_others:
            await self.shut_down(mode)
            return
        try:
            await self._parts.peers.tell("shutdown", mode)
        except (LineFailed, TimeoutError) as error:
            raise _not_done([f"the supervisor: {error or 'no answer'}"]) from None

    async def shut_down(self, mode: str) -> None:
        """End this process: at once, or begin to wait as `mode` says."""
        relay, router = self._parts.relay, self._parts.router
        self._parts.stop_accepting()
        match mode:
            case "WAIT_FOR_SERVERS":
                router.orders.change("KILL", None)
                router.obey(router.orders)
                relay.spawn(self._stop_without_servers())
            case "WAIT_FOR_CLIENTS":
                relay.spawn(self._stop_without_clients())
            case _:
                await relay.drain(0.0)
                self._parts.stop()

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


async def _until(is_done: Callable[[], bool], longest: float = math.inf) -> bool:
    """Wait until something is done, at most so many seconds; say whether it is."""
    clock = asyncio.get_running_loop().time
    end = clock() + longest
    while not is_done():
        if clock() >= end:
            return False
        await asyncio.sleep(WAIT_INTERVAL)
    return True


def _not_done(silent: list[str]) -> Refused:
    return Refused("58000", f"not done by {'; '.join(silent)}", "the others did it")


def _no_database(name: str) -> Refused:
    return Refused("3D000", f"there is no database {name}", "see SHOW DATABASES")
