"""The case `fleet`: many organisations at once, and how soon a change is known.

A thousand organisations, each with a connection that queries every second, on two
workers: what it takes of memory and of Redis. And a hundred changes of a tier by plain
SQL: from the COMMIT until the limit of every connection has changed.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
from rich.table import Table

from bench.case import Case, Result
from bench.crowd import Crowd, Group, connect
from bench.stack import Stack, until
from ogelproxy.tenants.model import LimiterMode

WORKERS = 2
ORGANIZATIONS, QUICK_ORGANIZATIONS = 1000, 100
#: Seconds in which all come, per organisation, and in which they are watched.
COMING, WATCHED = 0.012, 10.0
#: Seconds between the queries of one connection.
PAUSE = 1.0

CHANGES, QUICK_CHANGES = 100, 20
#: Connections that watch: enough for all workers to have some.
WATCHERS = 8
#: By turns; their queries per second.
TIERS = {"pro": 200.0, "enterprise": 1000.0}
MOVE = "UPDATE platform.organizations SET tier = $1 WHERE handle = $2"
SEEN_TIMEOUT = 10.0
#: Seconds in which a change has to be known.
MAX_SEEN = 1.0
POLL_INTERVAL = 0.002


async def hold_many(stack: Stack, result: Result, *, count: int) -> None:
    """Let `count` organisations come and query."""
    before = stack.memory_bytes()
    organizations = await stack.make(["starter"] * count)
    crowd = Crowd(stack, [Group(each, 1, PAUSE) for each in organizations])
    await crowd.start(count * COMING)
    calls, leases = await stack.redis_calls(), await _leases(stack)
    since = time.monotonic()
    await asyncio.sleep(WATCHED)
    elapsed = time.monotonic() - since
    calls, leases = await stack.redis_calls() - calls, await _leases(stack) - leases
    during = stack.memory_bytes()
    answered = sum(len(ledger.answered) for ledger in crowd.ledgers.values())
    await crowd.leave()
    errors = [code for _, code in crowd.errors()]
    result.figures = {
        "organisations": count,
        "errors": len(errors),
        "queries answered": answered,
        "Redis commands/s": calls / elapsed,
        "leases asked for/s": leases / elapsed,
        "memory of a worker, MB": max(during) / 1e6,
        "memory of an organisation, kB": (sum(during) - sum(before)) / count / 1e3,
    }
    if errors:
        result.failures.append(f"clients were told {sorted(set(errors))}")


async def _leases(stack: Stack) -> float:
    metrics = await stack.metrics()
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith("o7s_lease_requests_total")
    )


async def change_tier(stack: Stack, result: Result, *, count: int) -> None:
    """Change a tier `count` times, by SQL, as all workers look on."""
    [organization] = await stack.make(["pro"], mode=LimiterMode.ENFORCE)
    watchers = [await connect(stack, organization) for _ in range(WATCHERS)]
    workers = (await stack.status())["workers"]
    if not all(each["status"]["clients"] for each in workers):
        result.failures.append("the connections were all with one worker")
    took = []
    for number in range(count):
        tier = list(TIERS)[(number + 1) % 2]
        await stack.store.pool.execute(MOVE, tier, organization.handle)
        committed_at = time.monotonic()
        seen = await asyncio.gather(
            *(_seen(watcher, TIERS[tier]) for watcher in watchers)
        )
        took.append(max(seen) - committed_at)
    for watcher in watchers:
        await watcher.close()
    result.figures = {
        "changes": count,
        "median until seen by all, ms": statistics.median(took) * 1e3,
        "worst until seen by all, ms": max(took) * 1e3,
    }
    if max(took) > MAX_SEEN:
        result.failures.append(f"a change took {max(took):.2f} s to be seen")


async def _seen(watcher: asyncpg.Connection, rate: float) -> float:
    """Return when the connection's limit was seen to be `rate`."""

    async def has_changed() -> bool:
        row = await watcher.fetchrow("SHOW o7s.limits")
        return row is not None and row["queries_per_second"] == rate

    await until(has_changed, SEEN_TIMEOUT, interval=POLL_INTERVAL)
    return time.monotonic()


class FleetCase(Case):
    name = "fleet"
    about = "a thousand organisations at once, and how soon a change is known"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return ["many organisations", "a change of tier"]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(self._run(result, Path(directory), is_quick))
        return result

    async def _run(self, result: Result, directory: Path, is_quick: bool) -> None:
        async with Stack(directory, workers=WORKERS) as stack:
            if result.implementation == "many organisations":
                count = QUICK_ORGANIZATIONS if is_quick else ORGANIZATIONS
                await hold_many(stack, result, count=count)
            else:
                count = QUICK_CHANGES if is_quick else CHANGES
                await change_tier(stack, result, count=count)

    def tables(self, results: Sequence[Result]) -> list[Table]:
        table = Table(title=f"The fleet, with {WORKERS} workers")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for result in results:
            for figure, value in result.figures.items():
                table.add_row(figure, f"{value:,.0f}" if value > 10 else f"{value:.2g}")
        return [table]


CASE = FleetCase()
