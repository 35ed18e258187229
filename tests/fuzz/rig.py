"""The proxy's steady state between sockets that a fuzzer holds the ends of.

Everything is the real thing but what takes time or reaches out: the loop, which
runs what it was given when it is told to; the opening of servers; the login.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol
from uuid import UUID

from ogelproxy import sessions
from ogelproxy._bucket import TokenBucket
from ogelproxy._pool import Settings
from ogelproxy._traffic import Traffic
from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.allotment import Allotment
from ogelproxy.client import Client, Session
from ogelproxy.config import Config, Limits, Secret
from ogelproxy.config import Pool as PoolConfig
from ogelproxy.console.peers import Peers
from ogelproxy.console.tenant import TenantConsole
from ogelproxy.errors import OgelError
from ogelproxy.flights import Flights
from ogelproxy.gate import Admission, Gate
from ogelproxy.limiter import Limiter
from ogelproxy.listen import Channels
from ogelproxy.metrics import Metrics
from ogelproxy.pool import Pool
from ogelproxy.protocol import messages
from ogelproxy.relay import Relay
from ogelproxy.server import Server
from ogelproxy.tenants.model import (
    DatabaseType,
    LimiterMode,
    PoolMode,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.usage.ledger import Ledger

#: Rounds in which everything that is under way must have come to rest.
MAX_ROUNDS = 2000
#: Where all peers read to: a new one each time takes the sanitizer long to make.
BUFFER = memoryview(bytearray(1 << 20))
TIER = Tier("fuzz", 1000, 1000.0, 1, False, 0, 0, 0, None, None, None)


class Loop:
    """What the proxy asks of an event loop, without any waiting."""

    def __init__(self) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self.timers: list[asyncio.TimerHandle] = []

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Nothing: `Rig.settle` has the reactor look for itself."""

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)  # type: ignore[arg-type]
        self.ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(delay, callback, args, self)  # type: ignore[arg-type]
        self.timers.append(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if handle in self.timers:
            self.timers.remove(handle)

    def create_task(self, work: Any) -> Any:
        """Only what reaches out is a task, and the rig does without it."""
        work.close()
        raise AssertionError(f"a task was started: {work!r}")

    def get_debug(self) -> bool:
        return False

    def time(self) -> float:
        return time.monotonic()

    def run(self) -> None:
        while self.ready:
            handle = self.ready.popleft()
            if not handle.cancelled():
                handle._callback(*handle._args)  # type: ignore[attr-defined]

    def run_timers(self) -> None:
        due, self.timers = self.timers, []
        for handle in due:
            if handle.cancelled():  # by one before it
                continue
            handle._callback(*handle._args)  # type: ignore[attr-defined]


class Tenants:
    """The one record there is."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant

    def peek(self, handle: str) -> Tenant:
        return self.tenant

    def hold(self, handle: str) -> None: ...

    def release(self, handle: str) -> None: ...


class FuzzedRelay(Relay):
    """A Relay that lets defects pass, and reaches out to nobody."""

    def crashed(self, connection: Any, error: Exception) -> None:
        if not isinstance(error, OgelError):
            raise error
        super().crashed(connection, error)

    def abandon(self, server: Server, is_busy: bool) -> None:
        self.retire(server)

    def see_off(self, server: Server) -> None:
        server.close()
        self.seen_off(server)


class Ear:
    """The connection that listens for all clients, and hears at once that it does."""

    def __init__(self, answered: Callable[[], None], loop: Loop) -> None:
        self._answered = answered
        self._loop = loop

    def send(self, message: bytes) -> None:
        if message[:1] == b"Q":
            self._loop.call_soon(self._answered)

    def close(self) -> None: ...


class FuzzedChannels(Channels):
    """Channels that need no connection of their own."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._server = Ear(self._answered, pool.host.reactor.loop)  # type: ignore[assignment,arg-type]


class FuzzedConsole(TenantConsole):
    """The one view that says the same each time."""

    def __init__(self, relay: Relay, table: UsageTable) -> None:
        super().__init__(
            tenants=relay._tenants,
            gate=relay._gate,
            ledger=Ledger(table),
            limiter=relay._limiter,
            members=relay.clients,
            peers=Peers(None, 1, None),
            spawn=relay.spawn,
        )
        self._views = {"help": self._views["help"]}


class Keeper:
    """Wakes the queue of a bucket that mints its own tokens."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waking: asyncio.TimerHandle | None = None

    def ask(self, bucket: TokenBucket) -> None:
        raise AssertionError("there is nobody to lease from")

    def wake(self, bucket: TokenBucket, wait: float) -> None:
        self.stop()
        if math.isfinite(wait):
            self._waking = self._loop.call_later(wait, self._serve, bucket)

    def _serve(self, bucket: TokenBucket) -> None:
        self._waking = None
        bucket.serve(time.monotonic())

    def stop(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None


class Peer:
    """The other end of a connection of the proxy's."""

    def __init__(self, sock: socket.socket, connection: Client | Server) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.connection = connection
        self.received = bytearray()
        self.is_ended = False  # nothing more will come
        self.is_closed = False  # by itself
        self.is_reading = True

    def send(self, data: bytes) -> None:
        if data and self.sock.fileno() >= 0:
            try:
                sent = self.sock.send(data)
            except OSError:  # gone, or full: a peer that is not read from
                return
            assert sent == len(data)

    def receive(self) -> bytes:
        """What has come since the last time."""
        connection = self.connection
        if self.is_ended or not self.is_reading:
            return b""
        if connection.bytes_sent == len(self.received) and not connection.is_closed:
            return b""  # known without asking the kernel
        try:
            data = BUFFER[: self.sock.recv_into(BUFFER)].tobytes()
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.is_ended = True
        self.received += data
        return data

    def close(self) -> None:
        self.is_ended = self.is_closed = True
        self.sock.close()


class Answerer(Protocol):
    """Who says what a server says."""

    @property
    def is_closed(self) -> bool:
        """Whether it closes its connection, behind its last answer."""

    def feed(self, data: bytes) -> bytes:
        """Return the answer to what came."""


class Backend(Peer):
    """The far end of a server connection."""

    def __init__(self, sock: socket.socket, server: Server, answerer: Answerer) -> None:
        super().__init__(sock, server)
        self.server = server
        self.answerer = answerer
        self.owed = bytearray()  # answers kept back

    def serve(self) -> None:
        """Make the answer to what has come."""
        if data := self.receive():
            self.owed += self.answerer.feed(data)

    def say(self) -> bool:
        """Send what was kept back, and close behind it; tell if there was any."""
        if self.is_closed:
            return False
        owed = bytes(self.owed)
        self.owed.clear()
        self.send(owed)
        if self.answerer.is_closed:
            self.close()
            return True
        return bool(owed)


class FuzzedPool(Pool):
    """A Pool whose servers are there at once: sockets to the rig."""

    rig: Rig

    def open_one(self) -> None:
        self._begin_opening()
        self.host.reactor.loop.call_soon(self._opened)

    def _opened(self) -> None:
        self.opening -= 1
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        server = Server(self.host.reactor, ours.detach(), self.host, self)
        server.statuses = {}
        self.size += 1
        self.rig.backends.append(Backend(theirs, server, self.rig.make_answerer()))
        server.enter_pool()


class Rig:
    """One pool, its clients and its servers, for the length of one input."""

    def __init__(
        self,
        mode: PoolMode,
        make_answerer: Callable[[], Answerer],
        *,
        max_servers: int = 2,
        max_prepared: int = 3,
        max_prepared_bytes: int = 1000,
        limiter_mode: LimiterMode = LimiterMode.OFF,
        tokens: float = 3.0,
        max_wait: float = 0.0,
        max_in_flight: int = 0,
    ) -> None:
        self.make_answerer = make_answerer
        self.loop, self.relay, self.attribution, self.table, self.traffic = parts()
        target = Target(
            UUID(int=2),
            "app",
            DatabaseType.POSTGRES,
            mode,
            Secret("postgresql://postgres@/app?host=/nowhere"),
        )
        tenant = Tenant(UUID(int=1), "org_a", "A", TIER, False, 1, salt=b"salt")
        # Below the bounds of a setting, so that few bytes reach them.
        config = PoolConfig.model_construct(
            max_servers=max_servers,
            max_prepared_statements=max_prepared,
            max_prepared_bytes=max_prepared_bytes,
        )
        allotment = Allotment(0, self.loop.time, self.loop.call_later)
        self.pool = FuzzedPool(tenant, target, config, self.relay, allotment)
        self.pool.rig = self
        # A bucket that no time fills, so that an input means the same each time.
        self.keeper = Keeper(self.loop)
        self.bucket = TokenBucket(1e-9, tokens, time.monotonic(), self.keeper)
        self.bucket.mode = {"enforce": 0, "warn": 1, "off": 2}[limiter_mode]
        self.bucket.max_wait = max_wait
        self.flights = Flights()
        self.flights.shape(max_in_flight, tenant.version)
        self.backends: list[Backend] = []
        self.clients: list[tuple[Peer, Client]] = []

    def connect(self, start: Mapping[str, str] | None = None) -> Peer:
        """A client that has just logged in, with what it asked for at its start."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        client = Client(self.relay.reactor, ours.detach())
        process_id, secret = self.relay.cancels.issue(client, 0)
        known = {
            "handle": "org_a",
            "attribution": self.attribution,
            "process_id": process_id,
            "secret": secret,
            "admission": self._admission(),
        }
        # What else a login learns is for views that nobody asks for here.
        client.session = Session(
            **{each.name: known.get(each.name) for each in fields(Session)}
        )
        client.start(
            *(self.relay, self.pool, self._settings(start or {}), self.bucket),
            *(self.attribution, self.table, self.traffic, self.flights),
        )
        self.relay.enter(client)
        peer = Peer(theirs, client)
        self.clients.append((peer, client))
        return peer

    def _settings(self, start: Mapping[str, str]) -> Settings:
        """What `Pool.settings` returns once a server took them."""
        items = tuple(sorted(start.items()))
        settings = self.pool._intern(start)
        if items and items not in self.pool._settings:
            settings.restore = messages.query(sessions.restore(start))
            self.pool._settings[items] = settings
        return settings

    def _admission(self) -> Admission:
        admitting = self.relay._gate.admit(self.relay._tenants.peek("org_a"))
        try:
            admitting.send(None)
        except StopIteration as admitted:
            return admitted.value
        raise AssertionError("a gate that is alone waits for nothing")

    def turn(self) -> bool:
        """Let the proxy do what it can; tell whether any byte moved."""
        before = self._moved()
        self.loop.run()
        self.relay.reactor.turn()
        self.loop.run()
        for peer, _ in self.clients:
            peer.receive()
        for backend in self.backends:
            backend.serve()
        return self._moved() != before or bool(self.loop.ready)

    def _moved(self) -> int:
        peers: list[Peer] = [*self.backends, *(peer for peer, _ in self.clients)]
        return sum(
            len(peer.received) + peer.connection.bytes_received + peer.is_ended
            for peer in peers
        )

    def settle(self) -> None:
        """Have the servers answer all, until nothing moves any more."""
        calm = 0
        for _ in range(MAX_ROUNDS):
            moved = self.turn()
            for backend in self.backends:
                moved = backend.say() or moved
            calm = 0 if moved else calm + 1
            if calm == 2:  # a signal, as a fuzzer's alarm, may have ended one
                return
        raise AssertionError("it never comes to rest")

    def close(self) -> None:
        """End all, and see that nothing is left."""
        for peer, _ in self.clients:
            peer.close()
        self.settle()
        for _, client in self.clients:
            client.abort()
        self.settle()
        assert not self.bucket.queue
        self.keeper.stop()
        idle = self.pool.idle_servers
        for backend in self.backends:
            server = backend.server
            # A server is back in its pool, settled, or it is closed.
            assert server.is_closed or (server in idle and server.owed == 0), server
            assert server.is_closed or not server.unsent
        assert self.flights.count == self.flights.waiting_count == 0
        assert self.pool.allotment.taken == len(idle)
        assert self.pool.size == len(idle) and len(set(idle)) == len(idle)
        assert self.pool.waiting_count == self.pool.client_count == 0
        for server in idle:
            self.pool.withdraw(server)
            self.relay.retire(server)
        for backend in self.backends:
            backend.close()
        assert self.relay.reactor.connections == [] and not self.relay.clients
        assert len(self.relay._gate) == len(self.relay.cancels) == 0
        assert not self.loop.timers and not self.loop.ready
        self.clients.clear()
        self.backends.clear()


_parts: list[tuple[Loop, FuzzedRelay, Attribution, UsageTable, Traffic]] = []


def parts() -> tuple[Loop, FuzzedRelay, Attribution, UsageTable, Traffic]:
    """What is made once: reactor, relay and the tables that all count into."""
    if not _parts:
        sys.unraisablehook = raise_later
        loop = Loop()
        tenant = Tenant(UUID(int=1), "org_a", "A", TIER, False, 1, salt=b"salt")
        config = Config()
        relay = FuzzedRelay(
            config,
            loop=loop,  # type: ignore[arg-type]
            gate=Gate(),
            limiter=Limiter(Limits(), time.monotonic, loop=loop),  # type: ignore[arg-type]
            tenants=Tenants(tenant),  # type: ignore[arg-type]
            metrics=Metrics(),
        )
        relay.channels = FuzzedChannels
        table = UsageTable(64)
        relay.views = FuzzedConsole(relay, table).open
        attribution = Attribution(
            table,
            UUID(int=1).bytes,
            handle="org_a",
            database="app",
            database_type="postgres",
            tier="fuzz",
            application_name="",
            work_mem_bytes=1.0,
        )
        _parts.append((loop, relay, attribution, table, Traffic("fuzz", "postgres")))
    return _parts[0]


def raise_later(unraisable: Any) -> None:
    """An error in a place of compiled code that can't raise is a defect too."""
    _parts[0][0].call_soon(_raise, unraisable.exc_value)


def _raise(error: BaseException) -> None:
    raise error
