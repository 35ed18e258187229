"""Engine: builds the parts, owns them, starts and stops them in order.

    async with Engine(config) as engine:
        print(engine.addresses)

Nothing is global: two engines in one process never meet. An engine sets up no
logging and no signals, and runs on whatever event loop it is started in.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from ogelproxy.admin import Admin
from ogelproxy.auth import Authenticator
from ogelproxy.cancel import Neighbours
from ogelproxy.config import Config
from ogelproxy.console.operator import OperatorConsole, Parts
from ogelproxy.console.peers import Peers
from ogelproxy.console.tenant import TenantConsole
from ogelproxy.errors import (
    ConfigInvalid,
    ControlUnavailable,
    CredentialRejected,
    DatabaseUnknown,
    Draining,
    FeatureNotIncluded,
    OgelError,
    TenantSuspended,
)
from ogelproxy.flights import FlightBook
from ogelproxy.front import LineSlots
from ogelproxy.gate import Admission, Gate
from ogelproxy.limiter import Limiter
from ogelproxy.line import Line
from ogelproxy.listen import Channels
from ogelproxy.listener import Listener, load_tls
from ogelproxy.login import Login
from ogelproxy.metrics import CounterSample, GaugeSample, LatencySample, Metrics
from ogelproxy.pool import Pool
from ogelproxy.redis import Redis
from ogelproxy.relay import Relay
from ogelproxy.router import Router
from ogelproxy.slots import Slots
from ogelproxy.tenants import schema
from ogelproxy.tenants.cache import Start, TenantCache
from ogelproxy.tenants.directory import Directory, TenantDirectory
from ogelproxy.tenants.model import OPERATORS, REPLICATION, Tenant
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from ogelproxy.traffic import TrafficBook
from ogelproxy.usage import Meter
from ogelproxy.usage.events import EventSink, LoggedEvents, Outbox, PostgresEvents
from ogelproxy.usage.journal import Journal
from ogelproxy.usage.mongodb import MongoSink
from ogelproxy.usage.sinks import MemorySink, PostgresSink, Sink

log = logging.getLogger(__name__)

#: Seconds between looks at timeouts, idle servers and pools.
SWEEP_INTERVAL = 0.25

#: Seconds between notes of when keys were last used.
KEY_INTERVAL = 30.0

#: Seconds that a drain waits for clients that log in.
LOGIN_GRACE = 5.0

#: Seconds that the supervisor gets to read the settings, and all workers to take them.
RELOAD_TIMEOUT = 10.0


class Engine:
    """A proxy: listener, seven layers, and what they share."""

    def __init__(
        self,
        config: Config,
        *,
        directory: TenantDirectory | None = None,
        sinks: Sequence[Sink] | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        reread: Callable[[], Config] | None = None,
        listening: socket.socket | None = None,
        line: Line | None = None,
        place: int | None = None,
    ) -> None:
        """`reread` reads the settings anew, for an operator's RELOAD.

        An engine that is one of several workers is given the socket on which it is
        `listening`, the `line` to its supervisor, and its `place`, from 1.
        """
        self.config = config
        #: Set when an operator's SHUTDOWN asked for the end; clients are gone then.
        self.stop_asked = asyncio.Event()
        self._reread = reread
        self._listening = listening
        self._line = line
        self._place = place
        self.metrics = metrics or Metrics()
        self._clock = clock
        self._given_directory = directory
        self._given_sinks = sinks
        self._store: Store | None = None
        #: The control plane's; without one, stable for as long as the engine lives.
        self._mock_secret = secrets.token_bytes(32)
        self._mongodb: MongoSink | None = None  # while started, where one is configured
        self._redis: Redis | None = None  # while started, where one is configured
        self._slots: Slots[Admission] | None = None  # likewise; a worker has none
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._is_started = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # Starting and stopping.

    async def start(self) -> None:
        """Build and start every part; the port is open when this returns.

        Raises ConfigInvalid, ControlUnavailable, or OSError when a port is
        taken; nothing is left running then.
        """
        try:
            await self._start()
        except BaseException:
            await self._stop_parts()
            raise

    async def _start(self) -> None:
        config = self.config
        tls = load_tls(config.tls)
        if config.redis.url is not None:
            self._redis = Redis(config.redis)
        directory, sinks = await self._open_control()
        self.directory = directory
        self._meter = Meter(
            config.usage, sinks, clock=self._clock, is_shared=self._line is not None
        )
        await self._meter.start()
        self._journal = self._make_journal()
        await self._journal.start()
        self._gate = Gate()
        if self._line is not None:
            self._gate.slots = LineSlots(self._line, on_lost=self._gate.lose)
        elif self._redis is not None:
            self._slots = self._gate.slots = Slots(
                self._redis, is_strict=not config.limits.floor, on_lost=self._gate.lose
            )
        self._limiter = Limiter(config.limits, self._clock, self._redis)
        self._limiter.prompted = self._prompt
        self._flights = FlightBook(config.workers)
        self._relay = Relay(
            config,
            loop=asyncio.get_running_loop(),
            gate=self._gate,
            limiter=self._limiter,
            tenants=directory,
            metrics=self.metrics,
        )
        peers = Peers(self._line, config.workers, self._place)
        self._relay.views = TenantConsole(
            tenants=directory,
            gate=self._gate,
            ledger=self._meter.ledger,
            limiter=self._limiter,
            members=self._relay.clients,
            peers=peers,
            spawn=self._relay.spawn,
        ).open
        self._relay.channels = Channels
        self._relay.cancels.place = self._place
        Neighbours(
            self._relay.cancels,
            line=self._line,
            redis=self._redis,
            spawn=self._relay.spawn,
            clock=self._clock,
        )
        self._router = Router(config.pool, self._relay, config.workers)
        self._traffic = TrafficBook(self._relay.reactor.now)
        self._console = OperatorConsole(
            Parts(
                config=lambda: self.config,
                relay=self._relay,
                router=self._router,
                tenants=directory,
                gate=self._gate,
                traffic=self._traffic,
                journal=self._journal,
                peers=peers,
                address=lambda: self._listener.address,
                console_count=lambda: len(self._console),
                reload=self._reload,
                stop_accepting=self._stop_accepting,
                stop=self.stop_asked.set,
            )
        )
        authenticator = Authenticator(config.auth, mock_secret=self._mock_secret)
        self._login = Login(
            config,
            relay=self._relay,
            tenants=directory,
            authenticator=authenticator,
            gate=self._gate,
            limiter=self._limiter,
            flights=self._flights,
            router=self._router,
            meter=self._meter,
            metrics=self.metrics,
            traffic=self._traffic,
            console=self._console,
            journal=self._journal,
        )
        self._login.tls = tls
        directory.subscribe(self._tenant_changed)
        if self._redis is not None:
            # Everything that hears a channel has said so by now.
            await self._redis.start()
        await self._limiter.start()
        if self._slots is not None:
            await self._slots.start()
        await directory.start()
        if self._line is not None:
            await self._console.follow(self._line)
        self._listener = Listener(config, self._login, self._relay)
        self._listener.open(self._listening)
        self.metrics.add_source(self._samples)
        self._admin: Admin | None = None
        if config.admin.port is not None:
            self._admin = Admin(config.admin, self)
            await self._admin.start()
        self._tasks = [
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._note_keys()),
        ]
        self._is_started = True

    async def _open_control(self) -> tuple[TenantDirectory, Sequence[Sink]]:
        control = self.config.control
        usage = self.config.usage
        if usage.mongodb_url is not None:
            self._mongodb = MongoSink(usage.mongodb_url, usage.history_days)
        history: list[Sink] = [] if self._mongodb is None else [self._mongodb]
        if self._given_directory is not None:
            sinks = self._given_sinks or history or [MemorySink()]
            return self._given_directory, sinks
        if control.database_url is None or control.secret_key is None:
            raise ConfigInvalid(
                "control.database_url (DATABASE_URL) and control.secret_key "
                "(O7S_SECRET_KEY) are needed"
            )
        vault = Vault(control.secret_key)
        self._store = Store(control, vault)
        await self._store.open()
        cache = None
        if self._redis is not None:
            cache = TenantCache(self._redis, vault, clock=self._clock)
        self._mock_secret = await _prepare(self._store, cache)
        directory = Directory(self._store, control, self._clock, cache)
        self.metrics.add_source(directory.samples)
        if self._given_sinks is not None:
            return directory, self._given_sinks
        billing = PostgresSink(
            self._store.pool,
            usage.history_days,
            keeps_history=self._mongodb is None,
        )
        return directory, [billing, *history]

    def _make_journal(self) -> Journal:
        """Events go to MongoDB if it is set, else to the control plane if there is."""
        usage = self.config.usage
        sink: EventSink = LoggedEvents()
        outbox: Outbox | None = None
        if self._mongodb is not None:
            sink = self._mongodb
            if self._store is not None:
                outbox = Outbox(self._store.pool, sink)
        elif self._store is not None:
            sink = PostgresEvents(self._store.pool, usage.history_days)
        return Journal(
            usage.spool_dir / "events",
            sink,
            interval=usage.batch_interval,
            forward=None if outbox is None else outbox.forward,
        )

    def _prompt(self, tenant: Tenant) -> None:
        """Note that a tenant meets its rate often."""
        self._journal.note(
            tenant.id,
            "upgrade_prompt.max_queries_per_second",
            tier=tenant.tier.name,
            limit=tenant.tier.max_queries_per_second,
        )

    async def drain(self, grace: float | None = None) -> None:
        """Accept no more, let transactions finish, tell idle clients 57P01.

        Bounded by `drain_timeout`, or by `grace` seconds.
        """
        self._stop_accepting()
        await self._drain(self.config.drain_timeout if grace is None else grace)

    async def _drain(self, grace: float) -> None:
        # Who was accepted is told in words, not cut off in the middle of its login.
        loop = asyncio.get_running_loop()
        end = loop.time() + LOGIN_GRACE
        await self._relay.drain(
            grace, lambda: self._listener.login_count > 0 and loop.time() < end
        )

    def _stop_accepting(self) -> None:
        self._is_draining = True
        self._listener.close()

    async def stop(self, grace: float | None = None) -> None:
        """Drain for at most `grace` seconds, then end everything."""
        if self._is_started and not self._is_draining:
            await self.drain(grace)
        await self._stop_parts()

    async def _stop_parts(self) -> None:
        self._is_started = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for name in ("_listener", "_router"):
            if (part := getattr(self, name, None)) is not None:
                part.close()
        for name in (
            "_admin",
            "_console",
            "_relay",
            "_limiter",
            "_meter",
            "_journal",
            "directory",
        ):
            if (part := getattr(self, name, None)) is not None:
                await part.stop()
        if self._slots is not None:
            await self._slots.stop()
            self._slots = None
        if self._redis is not None:
            await self._redis.stop()
            self._redis = None
        if self._mongodb is not None:
            self._mongodb.close()
            self._mongodb = None
        if self._store is not None:
            await self._store.close()
            self._store = None

    def reload(self, config: Config) -> None:
        """Take new settings for what comes after, and read certificates anew.

        Raises ConfigInvalid and changes nothing when they are wrong. Where the
        proxy listens, and the control plane, need a restart.
        """
        tls = load_tls(config.tls)
        self._login.tls = tls
        self._login.config = config
        self._relay.reload(config)
        self._router.reload(config.pool)
        self.config = config
        log.info("settings reloaded")

    async def _reload(self) -> None:
        if self._line is not None:
            # The supervisor reads them for all of its workers.
            await self._line.ask("reload", answer_timeout=RELOAD_TIMEOUT)
        elif self._reread is None:
            raise ConfigInvalid("this engine was given its settings, not a file")
        else:
            self.reload(self._reread())

    # What it tells.

    @property
    def addresses(self) -> Mapping[str, tuple[str, int] | None]:
        """Where clients (`postgres`) and operators (`admin`) connect."""
        admin = None
        if self._admin is not None:
            admin = (self.config.admin.host, self._admin.port)
        return {"postgres": self._listener.address, "admin": admin}

    @property
    def is_ready(self) -> bool:
        return self._is_started and not self._is_draining

    @property
    def _redis_state(self) -> str:
        if self._redis is None:
            return "none"
        return "up" if self._redis.is_up else "away"

    async def render(self) -> bytes:
        return self.metrics.render()

    async def describe(self) -> Mapping[str, Any]:
        return self.status()

    def status(self) -> Mapping[str, Any]:
        """A picture of the engine for operators, without secrets."""
        reasons = ["draining"] if self._is_draining else []
        stale_since = self.directory.stale_since
        stale = 0.0 if stale_since is None else self._clock() - stale_since
        return {
            "ready": self.is_ready,
            "reasons": reasons,
            "control_plane": "degraded" if self.directory.is_degraded else "up",
            "control_plane_stale_seconds": round(stale, 1),
            "redis": self._redis_state,
            "usage_spool": self._meter.spool_state,
            "event_spool": "half full" if self._journal.is_crowded else "ok",
            "draining": self._is_draining,
            "clients": self._relay.client_count,
            "pools": [
                {
                    "organisation": pool.handle,
                    "database": pool.target.name,
                    "mode": str(pool.target.pool_mode),
                    "clients": pool.client_count,
                    "waiting": pool.waiting_count,
                    "servers": pool.size,
                    "idle": pool.idle_count,
                    "circuit": pool.circuit.state,
                }
                for pool in self._router.pools
            ],
        }

    def _samples(self) -> Iterable[LatencySample | GaugeSample | CounterSample]:
        for traffic in self._traffic.sums():
            tier, kind = traffic.tier, traffic.database_type
            counts = traffic.buckets
            yield LatencySample(tier, kind, counts, traffic.seconds)
            labels = {"tier": tier, "database_type": kind}
            yield CounterSample("o7s_requests_total", labels, sum(counts))
            for outcome in ("delayed", "refused", "warned"):
                yield CounterSample(
                    "o7s_throttled_total",
                    {"tier": tier, "outcome": outcome},
                    getattr(traffic, outcome),
                )
            yield CounterSample(
                "o7s_in_flight_waits_total", {"tier": tier}, traffic.flight_waits
            )
            yield CounterSample(
                "o7s_bytes_total", {"direction": "in"}, traffic.bytes_in
            )
            yield CounterSample(
                "o7s_bytes_total", {"direction": "out"}, traffic.bytes_out
            )
        yield GaugeSample("o7s_tenants_cached", {}, len(self.directory))
        yield GaugeSample("o7s_control_up", {}, not self.directory.is_degraded)
        if self._redis is not None:
            yield GaugeSample("o7s_redis_up", {}, self._redis.is_up)
        if self._slots is not None:
            unproven = self._slots.unproven_count
            yield GaugeSample("o7s_unproven_connections", {}, unproven)
        asked, unanswered = self._limiter.ask_count, self._limiter.unanswered_count
        yield CounterSample("o7s_lease_requests_total", {"answered": "no"}, unanswered)
        yield CounterSample(
            "o7s_lease_requests_total", {"answered": "yes"}, asked - unanswered
        )
        meter = self._meter
        yield GaugeSample("o7s_usage_spooled_batches", {}, meter.spooled_count)
        journal = self._journal
        yield CounterSample("o7s_events_dropped_total", {}, journal.dropped_count)
        yield GaugeSample("o7s_usage_spool_bytes", {}, meter.spool_bytes)
        limit = self.config.usage.max_spool_bytes
        yield GaugeSample("o7s_usage_spool_limit_bytes", {}, limit)
        yield CounterSample(
            "o7s_usage_delivered_batches_total", {}, meter.delivered_count
        )
        pools = self._router.pools
        idle = sum(pool.idle_count for pool in pools)
        servers = sum(pool.size for pool in pools)
        yield GaugeSample("o7s_clients", {}, self._relay.client_count)
        yield GaugeSample("o7s_servers", {"state": "idle"}, idle)
        yield GaugeSample("o7s_servers", {"state": "active"}, servers - idle)
        moved = self._relay.moved_count
        yield CounterSample("o7s_servers_moved_total", {}, moved)
        pinned = self._relay.pinned_count
        yield GaugeSample("o7s_pinned_clients", {}, pinned)
        waiting = sum(pool.waiting_count for pool in pools)
        yield GaugeSample("o7s_waiting_clients", {}, waiting)
        for pool in pools:
            yield from _listen_samples(pool)
            labels = {"database_type": str(pool.target.type)}
            is_open = pool.circuit.state != "closed"
            yield GaugeSample("o7s_circuit_open", labels, is_open)

    # What goes on.

    async def _note_keys(self) -> None:
        """Tell the control plane which keys were used, now and then."""
        while self._store is not None:
            await asyncio.sleep(KEY_INTERVAL)
            uses, self._login.key_uses = self._login.key_uses, {}
            try:
                if uses:
                    await self._store.record_key_uses(uses)
            except OgelError as error:
                # Only the latest use matters: the next one will be told.
                log.warning("uses of keys were not noted: %s", error)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            now = self._relay.reactor.loop.time()
            try:
                self._relay.sweep(now)
                self._router.sweep(now)
                pools = self._router.pools
                self._traffic.sweep(now, (pool.target.id for pool in pools))
            except Exception:
                log.exception("sweep failed")

    def _tenant_changed(self, old: Tenant, new: Tenant | None) -> None:
        """Carry a change in the control plane to open connections."""
        if old.handle == OPERATORS:
            self._console.update(new)
            return
        if new is None:
            self._limiter.forget(old.handle)
        else:
            self._limiter.update(new)
            self._flights.update(new)
        self._router.update(old, new)
        for client in list(self._relay.clients.get(old.handle, ())):
            error = _why_not(client.session, old, new)
            if error is not None:
                self._relay.fail(client, error)


async def _prepare(store: Store, cache: TenantCache | None) -> bytes:
    """Bring the control plane up to date; return its secret for mock salts.

    While it is away, what an earlier start of the same release left in Redis will
    do. Raises ControlUnavailable.
    """
    newest, _ = schema.scripts()[-1]
    try:
        await store.migrate()
        secret = await store.fetch_mock_secret()
    except ControlUnavailable as error:
        start = None if cache is None else await cache.fetch_start()
        if start is None or start.schema != newest:
            raise
        log.warning("starting with what Redis knows: %s", error)
        return start.mock_secret
    if cache is not None:
        await cache.write_start(Start(newest, secret))
    return secret


def _listen_samples(pool: Pool) -> Iterable[GaugeSample | CounterSample]:
    channels = pool.channels
    clients = channels.clients
    kept = sum(client.told_later_count for client in clients)
    yield GaugeSample("o7s_listening_clients", {}, len(clients))
    yield GaugeSample("o7s_channels", {}, channels.count)
    yield GaugeSample("o7s_kept_notifications", {}, kept)
    yield CounterSample("o7s_notifications_total", {}, channels.told_count)


def _why_not(session: Any, old: Tenant, new: Tenant | None) -> OgelError | None:
    """Why an open connection may not go on under the new record, or None."""
    if new is None or new.is_suspended:
        return TenantSuspended()
    if session.key_id is not None and all(key.id != session.key_id for key in new.keys):
        return CredentialRejected("the key was revoked")
    target = new.databases.get(session.database)
    if target is None or target.id != session.target_id:
        return DatabaseUnknown(session.database)
    if target != old.databases.get(session.database):
        # Its pool goes to where the database was: it has to come again.
        return Draining()
    if session.is_replication and REPLICATION not in new.tier.features:
        return FeatureNotIncluded(REPLICATION, new.tier.name)
    return None
