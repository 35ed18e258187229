"""The case `idle`: what a client that does nothing keeps of the proxy's memory.

Thousands of clients log in, and then do nothing; in a second turn each has run a
query first. The proxy is a new one in each turn, and has had a few clients already.
What TLS adds is OpenSSL's: 9 kB of a connection that begins, 16 kB of one that is
there, both ends of its memory BIOs included.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import secrets
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import psutil
from rich.table import Table

from bench import peers
from bench.arena import MAKE_TIER, OURS, TIER
from bench.case import Case, Result
from bench.stack import Stack
from bench.visitor import Door, Visitor
from ogelproxy.tenants.model import PoolMode
from tests.fixtures.certificates import Authority

PEER = peers.PgBouncer.name
OVER_TLS = f"{OURS} with TLS"
CLIENTS, QUICK_CLIENTS = 5000, 500
#: Clients that come before, so that what the first ones need is there.
WARM_UP = 30
SERVERS = 20
#: Bytes of a client; spec section 9.
MAX_BYTES = 10_000
#: Seconds until all that a login needed is given back.
SETTLING = 2.0
#: Turns, and whether a client runs a query in them.
TURNS = {"after a login": False, "after a query": True}
#: Descriptors beside one per client.
SPARE_DESCRIPTORS = 200
QUERY = "SELECT 1"
BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"


class IdleCase(Case):
    name = "idle"
    about = "memory of clients that do nothing, beside PgBouncer's"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        is_here = peers.PgBouncer in peers.present()
        return [OURS, OVER_TLS, *([PEER] if is_here else [])]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_run(result, Path(directory), is_quick))
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        table = Table(title="Resident memory of an idle client, in the proxy")
        for column in ("", "clients", *TURNS, "at most", "kept"):
            table.add_column(column, justify="right" if column else "left")
        for result in results:
            its = result.figures
            bounds = ["-", "-"]
            if result.implementation == OURS:
                bounds = [
                    f"{MAX_BYTES / 1e3:.0f} kB",
                    "no" if result.failures else "yes",
                ]
            table.add_row(
                *(result.implementation, f"{its['clients']:,.0f}"),
                *(
                    f"{its[f'of a client {turn}, bytes'] / 1e3:.2f} kB"
                    for turn in TURNS
                ),
                *bounds,
            )
        return [table]


CASE = IdleCase()


async def _run(result: Result, directory: Path, is_quick: bool) -> None:
    count = QUICK_CLIENTS if is_quick else CLIENTS
    _raise_limit(count + SPARE_DESCRIPTORS)
    authority = Authority(directory)
    certificate = authority.issue()
    tls = None
    if result.implementation == OVER_TLS:
        tls = ssl.create_default_context(cafile=str(authority.cert))
    settings = {
        "OGELPROXY_TLS_CERT": str(certificate.cert),
        "OGELPROXY_TLS_KEY": str(certificate.key),
        "OGELPROXY_POOL_MAX_SERVERS": str(SERVERS),
    }
    stack = Stack(directory, workers=1, settings=settings, has_history=False)
    result.figures["clients"] = count
    async with stack:
        await stack.store.pool.execute(MAKE_TIER, TIER)
        [organization] = await stack.make([TIER])
        door = Door.of(stack.url(organization), tls)
        for turn, asks in TURNS.items():
            proxy: contextlib.AbstractAsyncContextManager[tuple[Door, int]]
            if result.implementation == PEER:
                proxy = _theirs(stack, directory)
            else:
                proxy = _ours(stack, door)
            async with proxy as (door, pid):
                each, servers = await asyncio.to_thread(
                    _hold, door, pid, stack, count, asks=asks
                )
            result.figures[f"of a client {turn}, bytes"] = each
            result.figures[f"servers {turn}"] = servers
            if result.implementation == OURS and each > MAX_BYTES:
                result.failures.append(f"a client takes {each:.0f} bytes {turn}")
            if servers > SERVERS:
                result.failures.append(f"{servers} servers are open {turn}")


@contextlib.asynccontextmanager
async def _ours(stack: Stack, door: Door) -> AsyncIterator[tuple[Door, int]]:
    """Have a new proxy that had no client; give its door and its process."""
    await stack.stop_proxy()
    await stack.start_proxy()
    [pid] = stack.pids()
    yield door, pid


@contextlib.asynccontextmanager
async def _theirs(stack: Stack, directory: Path) -> AsyncIterator[tuple[Door, int]]:
    """Have a new PgBouncer, likewise."""
    password = Door.of(stack.postgres.dsn()).password
    upstream = peers.Upstream(stack.postgres, "postgres", password, SERVERS)
    peer = peers.PgBouncer(directory / PEER, upstream, secrets.token_hex(12))
    try:
        await peer.start()
        assert peer.pid is not None
        yield Door.of(peer.url(PoolMode.TRANSACTION)), peer.pid
    finally:
        await peer.stop()


def _hold(
    door: Door, pid: int, stack: Stack, count: int, *, asks: bool
) -> tuple[float, int]:
    """Return a client's bytes in a process, and how many servers there are."""
    process = psutil.Process(pid)
    with _inside(door, WARM_UP, asks=asks):
        pass
    time.sleep(SETTLING)
    before = process.memory_info().rss
    with _inside(door, count, asks=asks):
        time.sleep(SETTLING)
        after = process.memory_info().rss
        observer = Visitor(Door.of(stack.postgres.dsn())).enter()
        [[backends]] = observer.ask(BACKENDS)
        observer.leave()
    assert backends is not None
    return (after - before) / count, int(backends) - 1


@contextlib.contextmanager
def _inside(door: Door, count: int, *, asks: bool) -> Iterator[None]:
    """Have so many clients logged in, one after the other."""
    with contextlib.ExitStack() as visitors:
        for _ in range(count):
            visitor = Visitor(door)
            visitors.callback(visitor.leave)
            visitor.enter()
            if asks:
                visitor.ask(QUERY)
        yield


def _raise_limit(descriptors: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(descriptors, hard), hard))
