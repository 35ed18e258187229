"""Stack: `ogelproxy serve` with everything it depends on, each part breakable.

A Postgres for tenants, another one for the control plane, a Valkey behind a `Link`,
and a MongoDB-wire server where its package is installed. Unlike `ogelproxy dev`,
whatever is below the proxy can be stopped, slowed and cut without its knowledge.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import orjson
import psutil
from cryptography.fernet import Fernet
from pymongo import MongoClient

from bench.case import ROOT
from bench.link import Link
from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.child import LOOPBACK, free_port
from ogelproxy.config import Control, Secret
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.embedded import EmbeddedPostgres
from ogelproxy.embedded_mongodb import EmbeddedMongo, is_installed
from ogelproxy.embedded_valkey import EmbeddedValkey
from ogelproxy.redis import Redis
from ogelproxy.tenants.model import DatabaseType, LimiterMode, PoolMode
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from ogelproxy.usage.mongodb import USAGE

ACTOR = "bench"
DATABASE = "app"
#: Losing the machine is none of the faults, and the disk none of the measurements.
POSTGRES_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "max_connections": "1300",
}
READY_TIMEOUT = 30.0
POLL_INTERVAL = 0.05
#: Seconds that a proxy gets to drain.
STOP_TIMEOUT = 40.0
#: Organisations made at once.
MADE_AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Organization:
    """An organisation of the stack, with what its clients need."""

    id: UUID
    handle: str
    key: str
    tier: str


class Stack:
    """Everything, started by `async with`, in the main thread."""

    def __init__(
        self,
        directory: Path,
        *,
        workers: int,
        settings: Mapping[str, str] | None = None,
        has_history: bool = True,
    ) -> None:
        """`settings` are of the proxy's environment, beside those of the stack.

        Without history there is no MongoDB, and the control plane has what it would.
        """
        self.workers = workers
        self.settings = dict(settings or {})
        self.port = free_port()
        self.admin_port = free_port()
        self.postgres = EmbeddedPostgres(
            directory / "tenants", password=_secret(), settings=POSTGRES_SETTINGS
        )
        self.control = EmbeddedPostgres(
            directory / "control", password=_secret(), settings={"fsync": "off"}
        )
        self.valkey = EmbeddedValkey(directory / "valkey", password=_secret())
        has_mongo = has_history and is_installed()
        self.mongo = EmbeddedMongo(directory / "mongo") if has_mongo else None
        self.log = directory / "proxy.log"
        self._directory = directory
        self._secret_key = Fernet.generate_key().decode()
        self._parts = contextlib.AsyncExitStack()  # all that runs
        self._process: subprocess.Popen[bytes] | None = None
        self._store: Store | None = None  # while started

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            for part in (self.postgres, self.control, self.valkey, self.mongo):
                if part is not None:
                    parts.push_async_callback(part.stop)
                    await part.start()
            await declare_new(self.valkey)
            self.link = await parts.enter_async_context(
                Link((LOOPBACK, self.valkey.port))
            )
            self._store = await parts.enter_async_context(
                Store(
                    Control(database_url=Secret(self.control.dsn())),
                    Vault(Secret(self._secret_key)),
                )
            )
            await self._store.migrate()
            parts.push_async_callback(self.stop_proxy)
            await self.start_proxy()
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._parts.aclose()

    # The proxy.

    @property
    def environment(self) -> dict[str, str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OGELPROXY_", "O7S_"))
        }
        urls = {
            "DATABASE_URL": self.control.dsn(),
            "REDIS_URL": through(self.valkey.url, self.link),
        }
        if self.mongo is not None:
            urls["MONGODB_URL"] = self.mongo.url(DATABASE)
        return clean | urls | {
            "O7S_SECRET_KEY": self._secret_key,
            "O7S_PORT": str(self.port),
            "PORT": str(self.admin_port),
            "OGELPROXY_USAGE_SPOOL_DIR": str(self._directory / "spool"),
            "OGELPROXY_USAGE_BATCH_INTERVAL": "1",
            "OGELPROXY_DRAIN_TIMEOUT": "5",
        } | self.settings  # fmt: skip

    async def start_proxy(self) -> None:
        """Start `serve` and wait until all workers accept. Raises TimeoutError."""
        self._process = self._launch()
        await until(self._has_started, READY_TIMEOUT)

    async def _has_started(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"no start: {self.log.read_text()[-2000:]}")
        return await self.is_ready()

    def _launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "ogelproxy", "serve"),
                    *("--workers", str(self.workers)),
                ],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # As a service has: Linux shares out CPU time by sessions first
                # (sched(7), "The autogroup feature"), and this one has the load's.
                start_new_session=True,
            )

    async def stop_proxy(self) -> None:
        """Let it drain and end; idempotent."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def kill_proxy(self) -> None:
        """End the supervisor and all workers without a goodbye."""
        assert self._process is not None
        pids = {*self.pids(), self._process.pid}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        self._process = None

    def roll(self) -> None:
        """Have all workers replaced, one after the other."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def pids(self) -> list[int]:
        """The processes that carry clients, workers that still drain included."""
        assert self._process is not None
        if self.workers == 1:  # there is no supervisor
            return [self._process.pid]
        found = psutil.Process(self._process.pid).children()
        return [each.pid for each in found if each.is_running()]

    def memory_bytes(self) -> list[int]:
        """The resident memory of each worker."""
        return [psutil.Process(pid).memory_info().rss for pid in self.pids()]

    async def cut_redis(self, pid: int) -> None:
        """Cut Redis from one process, until the link heals."""

        def is_cut(port: int) -> bool:
            open_ones = psutil.Process(pid).net_connections("tcp4")
            return any(each.laddr.port == port for each in open_ones)

        await self.link.cut(is_cut)

    async def is_ready(self) -> bool:
        """Whether a worker accepts in every place."""
        try:
            await self.admin("/ready")
        except (OSError, aiohttp.ClientError):
            return False
        return True

    async def admin(self, path: str) -> bytes:
        """Ask the proxy's admin HTTP. Raises aiohttp.ClientError."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as session,
            session.get(f"http://{LOOPBACK}:{self.admin_port}{path}") as answer,
        ):
            answer.raise_for_status()
            return await answer.read()

    async def status(self) -> dict[str, Any]:
        """The proxy's picture of itself."""
        answer: dict[str, Any] = orjson.loads(await self.admin("/status"))
        return answer

    async def metrics(self) -> dict[str, float]:
        """The proxy's metrics, by name with labels."""
        text = (await self.admin("/metrics")).decode()
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        values = (line.rsplit(" ", 1) for line in lines)
        return {name: float(value) for name, value in values}

    async def redis_calls(self) -> int:
        """Commands that Valkey has run so far, those of scripts included."""
        redis = Redis(RedisConfig(url=Secret(self.valkey.url)))
        try:
            stats = await redis.command("INFO", "stats")
        finally:
            await redis.stop()
        return int(stats["total_commands_processed"])

    # Organisations.

    @property
    def store(self) -> Store:
        assert self._store is not None
        return self._store

    async def make(
        self,
        tiers: Sequence[str],
        *,
        mode: LimiterMode = LimiterMode.ENFORCE,
        max_wait: float = 0.0,
    ) -> list[Organization]:
        """Make an organisation per tier, each with the database `app`."""
        turn = asyncio.Semaphore(MADE_AT_ONCE)

        async def make(tier: str) -> Organization:
            async with turn:
                return await self._make(tier, mode, max_wait)

        return list(await asyncio.gather(*map(make, tiers)))

    async def _make(self, tier: str, mode: LimiterMode, wait: float) -> Organization:
        handle = f"org_{tier}_{secrets.token_hex(4)}"
        store = self.store
        await store.create_organization(handle, name=handle, tier=tier, actor=ACTOR)
        key = apikey.generate()
        salt, iterations = await store.fetch_scram(handle)
        verifier = await asyncio.to_thread(make_verifier, key, salt, iterations)
        await store.create_key(
            handle, "bench", *verifier, apikey.prefix(key), actor=ACTOR
        )
        await store.create_database(
            handle,
            DATABASE,
            DatabaseType.POSTGRES,
            # One for all: nothing here asks whether they are kept apart.
            Secret(self.postgres.local_dsn(password=None)),
            PoolMode.TRANSACTION,
            actor=ACTOR,
        )
        if mode is not LimiterMode.ENFORCE or wait:
            await store.set_limiter(handle, mode, wait, actor=ACTOR)
        made = await store.fetch_organization(handle)
        return Organization(made.id, handle, key, tier)

    def url(self, organization: Organization, database: str = DATABASE) -> str:
        login = f"{organization.handle}:{organization.key}"
        return f"postgresql://{login}@{LOOPBACK}:{self.port}/{database}"

    async def billed(self, organization: Organization) -> int:
        """The queries that the control plane has counted of an organisation."""
        found = await self.store.pool.fetchval(
            "SELECT coalesce(sum(query_count), 0) FROM platform.usage_metrics "
            "WHERE org_id = $1",
            organization.id,
        )
        return int(found)

    async def recorded(self, organization: Organization) -> int | None:
        """The queries in the history of MongoDB; None without MongoDB.

        Raises PyMongoError.
        """
        if self.mongo is None:
            return None
        url = self.mongo.url(DATABASE)

        def count() -> int:
            with MongoClient[dict[str, Any]](url, timeoutMS=5000) as client:
                found = client.get_default_database()[USAGE].aggregate(
                    [
                        {"$match": {"orgId": str(organization.id)}},
                        {"$group": {"_id": None, "queries": {"$sum": "$queries"}}},
                    ]
                )
                return sum(int(each["queries"]) for each in found)

        return await asyncio.to_thread(count)


async def until(
    holds: Callable[[], Awaitable[bool]],
    seconds: float,
    *,
    interval: float = POLL_INTERVAL,
) -> None:
    """Wait until a condition holds. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while True:
            if await holds():
                return
            await asyncio.sleep(interval)


async def declare_new(valkey: EmbeddedValkey) -> None:
    """Tell a Valkey that was started a moment ago that it has forgotten nothing."""
    redis = Redis(RedisConfig(url=Secret(valkey.url)))
    try:
        await redis.declare_new()
    finally:
        await redis.stop()


async def kill(part: EmbeddedValkey | EmbeddedMongo) -> None:
    """End a server as a power cut would."""
    assert part.pid is not None
    os.kill(part.pid, signal.SIGKILL)
    await part.wait_ended()


def through(url: str, link: Link) -> str:
    """The URL of what the link leads to, by the link."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@{LOOPBACK}:{link.port}").geturl()


def _secret() -> Secret:
    return Secret(secrets.token_urlsafe(18))
