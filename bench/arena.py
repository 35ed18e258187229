"""Arena: one Postgres with pgbench's tables, and each proxy that is here before it.

ogelproxy runs as it would for anybody: `ogelproxy serve`, all seven layers on, a
limit on queries that the load stays far below, a lease of it from Valkey, the usage
spool written and delivered. Peers have as many servers as it has.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import asyncpg
import psutil

from bench import peers, pgbench
from bench.stack import ACTOR, Stack
from ogelproxy.config import Secret
from ogelproxy.errors import EmbeddedFailed
from ogelproxy.tenants.model import DatabaseType, PoolMode

DIRECT = "direct"
OURS = "ogelproxy"
#: The same process, which goes to Postgres by TCP, as peers do that can't else.
OURS_BY_TCP = "ogelproxy (TCP)"

DATABASE = "bench"
TIER = "bench"
#: Far above what one machine can send.
MAKE_TIER = """
INSERT INTO platform.tier_limits
SELECT (jsonb_populate_record(tier, jsonb_build_object(
    'name', $1::text, 'max_queries_per_second', 1000000, 'max_connections', 10000
))).* FROM platform.tier_limits AS tier WHERE name = 'enterprise'
"""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way from a client to Postgres, and the processes on it."""

    name: str
    version: str
    #: Whose figures its own are set beside; none for our own and without a proxy.
    beside: str | None
    #: A URL per mode; a database without a proxy has one for both.
    urls: Mapping[PoolMode, str]
    pids: Callable[[], list[int]]
    can_prepare: Callable[[PoolMode], bool] = lambda mode: True

    def cpu_seconds(self) -> float:
        """Return the CPU time of its processes so far, the kernel's included."""
        return sum(
            times.user + times.system
            for times in (psutil.Process(pid).cpu_times() for pid in self.pids())
        )


class Arena:
    """Everything, started by `async with`, in the main thread."""

    def __init__(
        self, directory: Path, *, servers: int, kinds: Sequence[type[peers.Peer]]
    ) -> None:
        """`servers` is how many connections each pool of each proxy may have."""
        self.servers = servers
        self.kinds = kinds
        self.stack = Stack(
            directory,
            workers=1,
            settings={"OGELPROXY_POOL_MAX_SERVERS": str(servers)},
            has_history=False,
        )
        self.contestants: dict[str, Contestant] = {}
        self.absent: dict[str, str] = {}  # peers that did not start, and why
        self._directory = directory
        self._parts = contextlib.AsyncExitStack()  # all that runs

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            await parts.enter_async_context(self.stack)
            postgres = self.stack.postgres
            await self.execute(f"CREATE DATABASE {DATABASE}", database="postgres")
            await pgbench.prepare(postgres.dsn(DATABASE))
            await self._enlist_ours()
            direct = dict.fromkeys(peers.MODES, postgres.dsn(DATABASE))
            self._add(Contestant(DIRECT, "", None, direct, list))
            upstream = peers.Upstream(
                postgres,
                DATABASE,
                urlsplit(postgres.dsn()).password or "",
                self.servers,
            )
            for kind in self.kinds:
                directory, password = self._directory / kind.name, secrets.token_hex(12)
                peer = kind(directory, upstream, password)
                parts.push_async_callback(peer.stop)
                try:
                    await peer.start()
                except EmbeddedFailed as error:
                    self.absent[kind.name] = str(error)
                else:
                    self._enlist(peer)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._parts.aclose()

    async def execute(self, script: str, *, database: str = DATABASE) -> None:
        """Run statements without a proxy."""
        connection = await asyncpg.connect(self.stack.postgres.dsn(database))
        try:
            for statement in filter(str.strip, script.split(";")):
                await connection.execute(statement)
        finally:
            await connection.close()

    def proxies(self) -> list[Contestant]:
        """Return ours and the peers, without what nobody's figures are beside."""
        used = {OURS, *(each.beside for each in self.contestants.values())}
        return [
            each
            for each in self.contestants.values()
            if each.beside is not None or each.name in used
        ]

    def everybody(self) -> list[Contestant]:
        """Return Postgres without a proxy, and the proxies."""
        return [self.contestants[DIRECT], *self.proxies()]

    def _add(self, contestant: Contestant) -> None:
        self.contestants[contestant.name] = contestant

    def _enlist(self, peer: peers.Peer) -> None:
        def pids() -> list[int]:
            assert peer.pid is not None
            below = psutil.Process(peer.pid).children(recursive=True)
            return [peer.pid, *(each.pid for each in below)]

        self._add(
            Contestant(
                name=peer.name,
                version=peer.version,
                beside=OURS if peer.speaks_unix else OURS_BY_TCP,
                urls={mode: peer.url(mode) for mode in peers.MODES},
                pids=pids,
                can_prepare=peer.can_prepare,
            )
        )

    async def _enlist_ours(self) -> None:
        stack = self.stack
        await stack.store.pool.execute(MAKE_TIER, TIER)
        [organization] = await stack.make([TIER])
        roads = {
            OURS: stack.postgres.local_dsn(DATABASE),
            OURS_BY_TCP: stack.postgres.dsn(DATABASE),
        }
        for number, (name, dsn) in enumerate(roads.items()):
            urls = {}
            for mode in peers.MODES:
                database = f"{mode.value}_{number}"
                await stack.store.create_database(
                    *(organization.handle, database, DatabaseType.POSTGRES),
                    *(Secret(dsn), mode),
                    actor=ACTOR,
                )
                urls[mode] = stack.url(organization, database)
            self._add(Contestant(name, version("ogelproxy"), None, urls, stack.pids))
