"""Pool: the server connections of one target, and what of them takes time.

The compiled `PoolCore` lends and queues; here servers are opened when clients
wait, retired when they are old, idle or of the past, and start-up settings are
proven on a real server before a client is let in with them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ogelproxy import sessions
from ogelproxy._fingerprint import Flag
from ogelproxy._pool import PoolCore, Settings
from ogelproxy.allotment import RECENT, Allotment
from ogelproxy.circuit import Circuit
from ogelproxy.config import Pool as PoolConfig
from ogelproxy.errors import CircuitOpen, OgelError, PoolTimeout, TargetUnreachable
from ogelproxy.protocol import messages, sql
from ogelproxy.server import MISLEADING, Address, Memory, Server, misleading
from ogelproxy.steps import in_task
from ogelproxy.tenants.model import PoolMode, Target, Tenant

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.listen import Channels
    from ogelproxy.relay import Relay

log = logging.getLogger(__name__)

#: Combinations of settings remembered per pool, of start-ups and of later.
MAX_SETTINGS = 1000

MODES = {
    PoolMode.SESSION: 0,
    PoolMode.TRANSACTION: 1,
    PoolMode.STATEMENT: 2,
    PoolMode.AUTO: 3,
}


class SettingsRefused(OgelError):
    """The database refused what the start-up packet asks for, in its words."""

    code = "settings_refused"
    kind = "client"

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.sqlstate = fields.get("C", "22023")  # type: ignore[misc]
        self.client_text = fields.get("M", "invalid start-up setting")
        super().__init__(detail=fields.get("D", ""), hint=fields.get("H", ""))


class Pool(PoolCore):
    """The servers of one target, for the clients of one organisation."""

    host: Relay

    def __init__(
        self,
        tenant: Tenant,
        target: Target,
        config: PoolConfig,
        host: Relay,
        allotment: Allotment,
    ) -> None:
        super().__init__(
            MODES[target.pool_mode],
            config.max_prepared_bytes,
            config.max_prepared_statements,
        )
        self.host = host
        self.config = config
        self.handle = tenant.handle
        self.weight = tenant.tier.weight
        self.allotment = allotment  # where each server has a place; its router's
        self.target = target
        self.address = Address.parse(target.dsn.get_secret_value())
        self.memory = Memory()
        self.parameters = session_parameters(tenant)
        self.client_count = 0  # clients logged in to it; changed by Relay
        self.circuit = Circuit()
        self._channels: Channels | None = None  # made when first listened to
        self.opening = 0  # attempts begun or waiting for their time
        self.is_paused = False  # by an operator: no server is lent; set by the router
        self._swept_at = 0.0
        self._settings: OrderedDict[tuple[tuple[str, str], ...], Settings] = (
            OrderedDict()
        )
        self._followed: OrderedDict[tuple[tuple[str, str], ...], Settings] = (
            OrderedDict()
        )
        self._statuses: dict[str, str] = {}  # of a fresh server
        self._proving = asyncio.Lock()

    @property
    def channels(self) -> Channels:
        """What its clients listen to."""
        if self._channels is None:
            self._channels = self.host.channels(self)
        return self._channels

    @property
    def encoding(self) -> str:
        """The client_encoding of a server that none was asked of."""
        return self._statuses.get("client_encoding", "UTF8")

    @property
    def is_used(self) -> bool:
        """Whether anybody, or anything that has to be closed, is in it."""
        return bool(
            self.size
            or self.opening
            or self.client_count
            or (self._channels is not None and self._channels.is_open)
        )

    def wanted(self) -> None:
        """Open a server for a client that waits, where that is allowed."""
        if self.lack() > 0:
            self.allotment.ask(self)

    # What the allotment asks.

    def lack(self) -> int:
        """How many more servers it has use and room for."""
        if self.is_paused:
            return 0
        waiting = self.waiting_count + len(self.provers)
        room = self.config.max_servers - self.size
        return min(waiting, room) - self.opening

    def demand(self, now: float) -> int:
        """How many servers it uses, used a short while ago, or waits for."""
        idle: list[Server] = self.idle_servers
        used = self.size - sum(now - server.idle_since > RECENT for server in idle)
        return max(used, used + self.opening + self.lack())

    def open_one(self) -> None:
        """Open a server for those who wait."""
        self._begin_opening()
        self.host.spawn(self._open_for_waiters())

    def close_idle(self, now: float) -> bool:
        """Close the idle server used longest ago, if its tenure is over."""
        for server in self.idle_servers:
            if now - server.opened_at >= self.tenure and self.withdraw(server):
                self.host.hand_over(server)
                return True
        return False

    def _begin_opening(self) -> None:
        self.opening += 1
        self.allotment.take()

    async def _open_for_waiters(self) -> None:
        try:
            server = await self._open()
        except TargetUnreachable as error:
            self._refuse_waiters(error)
        else:
            server.enter_pool()

    def _refuse_waiters(self, error: TargetUnreachable) -> None:
        """Tell those who wait that there will be no server for them."""
        if self.size:
            # One that is in use may come free: they wait as in a full pool.
            return
        waiting = self.waiting_clients
        if isinstance(error, CircuitOpen) and self.circuit.state == "half-open":
            # The first of them is who the probe is made for.
            del waiting[:1]
        for client in waiting:
            client.give_up(self.host.error(error))
        while self.provers:
            future = self.provers.popleft()
            if not future.done():
                future.set_exception(error)

    async def connect(self, parameters: Mapping[str, str]) -> Server:
        """Log in to a server that the pool doesn't count, when the circuit lets it.

        `parameters` of the start-up packet go before the pool's own. Raises
        TargetUnreachable.
        """
        loop = self.host.reactor.loop
        pause = self.circuit.begin(loop.time())
        try:
            await asyncio.sleep(pause)
            server = await self._connect({**self.parameters, **parameters})
        except TargetUnreachable:
            raise
        except BaseException:
            self.circuit.forget()
            raise
        if self.circuit.succeed():
            log.info("circuit closed", extra={"tenant": self.handle})
        return server

    async def _open(self) -> Server:
        """Open a server; it was begun before. Raises TargetUnreachable."""
        try:
            server = await self._open_another()
        except BaseException:
            self.opening -= 1
            self.allotment.failed(self)
            raise
        self.opening -= 1
        return server

    async def _open_another(self) -> Server:
        epoch = self.epoch
        server = await self.connect({})
        if MISLEADING & server.statuses.items():
            server.close()
            error = TargetUnreachable(f"settings of the role: {misleading()}")
            log.warning("can't use a server: %s", error, extra={"tenant": self.handle})
            raise error
        self.size += 1
        # One that was under way when the pool was paused is not lent either.
        server.epoch = epoch - self.is_paused
        if self.config.server_lifetime:
            # Spread, so that servers opened together don't all end together.
            lifetime = self.config.server_lifetime * random.uniform(0.9, 1.1)
            server.expires_at = self.host.reactor.loop.time() + lifetime
        if self.baseline.statuses is None:
            self.baseline.statuses = render_statuses(server.statuses)
            self._statuses = dict(server.statuses)
        return server

    async def _connect(self, parameters: Mapping[str, str]) -> Server:
        loop = self.host.reactor.loop
        began = loop.time()
        try:
            async with asyncio.timeout(self.config.connect_timeout):
                return await Server.open(self, parameters)
        except TimeoutError:
            error = TargetUnreachable("connect timed out")
        except TargetUnreachable as failure:
            error = failure
        fields = {"tenant": self.handle}
        log.warning("can't open a server: %s", error, extra=fields)
        if self.circuit.fail(error, began, loop.time()):
            log.warning("circuit opened: no server is opened for now", extra=fields)
        raise error

    async def settings(self, items: tuple[tuple[str, str], ...]) -> Settings:
        """Return the one Settings object for `items`, proven on a server.

        `items` are names in lower case and values, sorted. Raises SettingsRefused
        with the database's own words, TargetUnreachable or PoolTimeout.
        """
        if not self.size:
            self.circuit.check(self.host.reactor.loop.time())
        found = self._settings.get(items)
        if found is not None:
            self._settings.move_to_end(items)
            return found
        await in_task()
        async with self._proving:
            # Clients that start together with the same settings prove them once.
            if (found := self._settings.get(items)) is None:
                found = self._settings[items] = await self._prove(items)
        while len(self._settings) > MAX_SETTINGS:
            self._settings.popitem(last=False)
        return found

    async def _prove(self, items: tuple[tuple[str, str], ...]) -> Settings:
        server = await self._borrow()
        try:
            settings = self.baseline
            if server.settings is not self.baseline:
                assert server.settings is not None
                await self._set(server, server.settings, self.baseline)
            server.statuses = {}
            if items:
                settings = Settings(items)
                await self._set(server, self.baseline, settings)
                if MISLEADING & server.statuses.items():
                    raise misleading()
                settings.statuses = render_statuses(self._statuses | server.statuses)
                settings.restore = messages.query(sessions.restore(dict(items)))
        except OSError as error:
            self.host.retire(server)
            raise TargetUnreachable(
                f"lost while settings were proven: {error}"
            ) from error
        except BaseException:
            self.host.retire(server)
            raise
        server.enter_pool()
        return settings

    async def _set(self, server: Server, have: Settings, want: Settings) -> None:
        failure = await server.run(self.switch(have, want))
        if failure is not None:
            raise SettingsRefused(failure)
        server.settings = want

    async def _borrow(self) -> Server:
        """Have a server for a use of the proxy's own."""
        server: Server | None = self.take_idle()
        has_room = self.size + self.opening < self.config.max_servers
        if (
            server is None
            and has_room
            and not self.is_paused
            and (self.allotment.has_room)
        ):
            self._begin_opening()
            server = await self._open()
        elif server is None:
            try:
                async with asyncio.timeout(self.config.queue_timeout):
                    server = await self.next_idle()
            except TimeoutError:
                raise PoolTimeout(self.config.queue_timeout) from None
        assert server is not None
        server.phase = 0  # a coroutine owns it
        return server

    def switch(self, have: Settings, want: Settings) -> bytes:
        """Build the query that takes a server from one setting to another."""
        return messages.query(sessions.switch(dict(have.items), dict(want.items)))

    # Session state, for the compiled side.

    def settings_changed(self, text: bytes) -> frozenset[str] | None:
        return sql.settings_changed(text)

    def may_reset(self, text: bytes) -> bool:
        return sql.DEFAULT.search(text) is not None

    def named_statements(self, text: bytes) -> list[sql.Named]:
        return sql.named_statements(text)

    def question(self, server: Server, client: Client, flags: int) -> bytes | None:
        touched = client.touched or frozenset()
        if "session_authorization" in touched:
            # It resets the role as well, however it is set.
            touched = touched | {"role"}
        if sql.ALL in touched:
            names = dict(client.settings.items) | dict(client.startup.items)
            touched = (touched - {sql.ALL}) | names.keys()
        if len(touched | dict(client.settings.items).keys()) > sessions.MAX_FOLLOWED:
            flags |= Flag.ANY_SETTING
            touched = frozenset()
        pins = 0
        if self.mode == MODES[PoolMode.AUTO]:
            self._hold(client, client.held_by | flags & sessions.LASTING_FLAGS)
            pins = sessions.suspects(flags & ~Flag.ANY_SETTING, client.held_by)
            if flags & Flag.OPAQUE:
                touched |= dict(client.settings.items).keys()
        server.question = sessions.Question.about(
            pins, touched, is_doubtful=server.had_error
        )
        return None if server.question is None else server.question.message()

    def answered(self, server: Server, client: Client, row: bytes | None) -> None:
        question = server.question
        items = dict(client.settings.items)
        if row is not None:
            pins, values = question.read(row)
            for name, value in values.items():
                items.pop(name, None)
                if value is not None:
                    items[name] = value
        size = sum(len(name) + len(value) for name, value in items.items())
        if row is None or size > sessions.MAX_FOLLOWED_BYTES:
            # It couldn't be told, or is too much: it stays with its server.
            if self.mode == MODES[PoolMode.AUTO]:
                self._hold(client, client.held_by | Flag.ANY_SETTING)
            else:
                server.is_retiring = True
            return
        asked = sum(question.pins)
        self._hold(client, client.held_by & ~asked | pins)
        if values:
            client.settings = server.settings = self._intern(items)

    def _hold(self, client: Client, flags: int) -> None:
        if flags != client.held_by:
            before, client.held_by = client.held_by, int(flags)
            self.host.pinned(client, before)

    def _intern(self, items: Mapping[str, str]) -> Settings:
        """The one Settings object for these items, so that pointers compare."""
        key = tuple(sorted(items.items()))
        if not key:
            return self.baseline
        found = self._settings.get(key) or self._followed.get(key)
        if found is None:
            found = self._followed[key] = Settings(key)
            while len(self._followed) > MAX_SETTINGS:
                self._followed.popitem(last=False)
        return found

    def reset_message(self, flags: int) -> bytes | None:
        if flags & Flag.LOAD:
            return None
        query = self.config.reset_query
        if query == "DISCARD ALL":
            query = sessions.reset(flags) or query
        return messages.query(query)

    def pause(self) -> None:
        """Lend no server until `resume`; those that are lent end with their loans."""
        self.is_paused = True
        self.retire_all()

    def resume(self) -> None:
        """Undo `pause`: open servers for those who wait."""
        self.is_paused = False
        for _ in range(self.waiting_count + len(self.provers)):
            self.wanted()

    def retire_all(self) -> None:
        """Use none of the present servers again once their loans end."""
        self.epoch += 1
        for server in self.idle_servers:
            if self.withdraw(server):
                self.host.retire(server)
        if self._channels is not None:
            self._channels.close()

    def sweep(self, now: float) -> None:
        """Close servers that nobody needed or that are old; time out waiters."""
        idle = self.config.server_idle_timeout
        for server in self.idle_servers:
            is_idle = idle and now - server.idle_since > idle
            is_old = 0 < server.expires_at < now
            if (is_idle or is_old) and self.withdraw(server):
                self.host.retire(server)
        self._sweep_waiters(now)
        if self._channels is not None:
            self._channels.sweep(now)
        if self.waiting_count or self.provers:
            self.wanted()

    def _sweep_waiters(self, now: float) -> None:
        notice_after = self.config.notice_after
        for ahead, client in enumerate(self.waiting_clients):
            waited = now - client.waiting_since
            if waited > self.config.queue_timeout:
                client.give_up(self.host.error(self._why_none(now, waited)))
            elif 0 < notice_after <= waited and (
                # Once: at the first sweep that finds it so.
                self._swept_at < client.waiting_since + notice_after
            ):
                client.send(
                    messages.plain_notice(
                        "still waiting for a server connection "
                        f"({ahead} ahead, {waited:.1f} s)"
                    )
                )
        self._swept_at = now

    def _why_none(self, now: float, waited: float) -> OgelError:
        try:
            self.circuit.check(now)
        except CircuitOpen as error:
            return error
        return PoolTimeout(waited)


def session_parameters(tenant: Tenant) -> dict[str, str]:
    """The tier's session settings, as start-up parameters of a server."""
    tier = tenant.tier
    return {
        "statement_timeout": str(round(tier.statement_timeout * 1000)),
        "idle_in_transaction_session_timeout": str(
            round(tier.idle_in_transaction_timeout * 1000)
        ),
        "work_mem": f"{tier.work_mem_kb}kB",
        # The limiter counts statements as they are read with this setting.
        "standard_conforming_strings": "on",
    }


def render_statuses(statuses: Mapping[str, str]) -> bytes:
    return b"".join(
        messages.parameter_status(name, value) for name, value in statuses.items()
    )
