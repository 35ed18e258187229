"""The case `connect`: what a login costs, and how long one waits for it.

An implementation here is a question, not a proxy: runs of ogelproxy and of PgBouncer
before the same Postgres take turns, and what counts is the median of their ratios.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from bench import knocking, peers, pgbench, questions, sheet
from bench.arena import OURS, TIER, Arena, Contestant
from bench.case import Case, Result
from bench.knocking import Arrivals, Manner
from bench.pairs import MIN_PAIRS, Promise, take_turns
from bench.sheet import Own
from bench.visitor import Door
from ogelproxy.tenants.model import PoolMode
from tests.fixtures.certificates import Authority

ALONE = "a new connection per query"
SHARED = "a new connection per query, slots in Redis"
PGBENCH = "a new connection per query, by pgbench"
WAIT = "200 logins a second"
TLS = "TLS"
#: How one comes in the question `TLS`.
PLAIN, FULL, RESUMED = "without TLS", "full handshake", "session taken up"
SERVERS = 20
#: Organisations whose visitors come by turns where the wait is asked for.
ORGANIZATIONS = 10
QUICK_PAIRS = 1
#: Seconds of one run, and of the one before the first that warms up.
SECONDS, QUICK_SECONDS = 3.0, 0.5
WARM_UP = 0.5
#: Likewise of pgbench, whose first is not counted.
PGBENCH_SECONDS, QUICK_PGBENCH_SECONDS = 5, 3
#: Logins per second, and milliseconds within which all but a twentieth must be in;
#: spec section 9.
RATE = 200.0
MAX_WAIT_MS = 50.0
PERCENTILES = (50, 95, 99)
JUDGED_PERCENTILE = 95


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run of `come_and_go` gave."""

    microseconds: float  # of the proxy's CPU, per login
    rate: float  # logins per second
    resumed: float  # share of them


class ConnectCase(Case):
    name = "connect"
    about = "what a login costs beside PgBouncer's, and how long it takes"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [ALONE, SHARED, PGBENCH, WAIT, TLS]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_Question(result, Path(directory), is_quick=is_quick).ask())
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        return sheet.tables(results)


CASE = ConnectCase()


class _Question:
    """One question, and what it is asked of."""

    def __init__(self, result: Result, directory: Path, *, is_quick: bool) -> None:
        self._result = result
        self._pairs = QUICK_PAIRS if is_quick else MIN_PAIRS
        self._seconds = QUICK_SECONDS if is_quick else SECONDS
        self._pgbench_seconds = QUICK_PGBENCH_SECONDS if is_quick else PGBENCH_SECONDS
        self._authority = Authority(directory)
        certificate = self._authority.issue()
        kinds = [kind for kind in peers.present() if kind is peers.PgBouncer]
        self._arena = Arena(directory, servers=SERVERS, kinds=kinds)
        stack = self._arena.stack
        is_alone = result.implementation in (ALONE, PGBENCH)
        stack.settings |= {
            "OGELPROXY_TLS_CERT": str(certificate.cert),
            "OGELPROXY_TLS_KEY": str(certificate.key),
            # Not by the stack's link to it, whose time would be ours.
            "REDIS_URL": "" if is_alone else stack.valkey.url,
        }

    async def ask(self) -> None:
        async with self._arena as arena:
            if self._result.implementation == WAIT:
                made = await arena.stack.make([TIER] * ORGANIZATIONS)
                await self._ask_wait([arena.stack.url(each) for each in made])
                return
            if self._result.implementation == PGBENCH:
                await self._ask_pgbench()
                return
            with knocking.processes() as pool:
                if self._result.implementation == TLS:
                    await self._ask_tls(pool)
                else:
                    await self._ask_cost(pool)

    async def _ask_cost(self, pool: ProcessPoolExecutor) -> None:
        rivals = self._arena.proxies()
        manners = {each.name: Manner(_url(each)) for each in rivals}
        runs = await self._knock(pool, rivals, manners)
        self._tell_cost(runs, Promise(1.0, is_least=True))

    async def _ask_pgbench(self) -> None:
        """Have pgbench connect, which stretches its password at each login.

        That takes it so long that its rate tells little; see `visitor`.
        """

        async def measure(rival: Contestant) -> _Run:
            outcome = await pgbench.run(
                _url(rival),
                protocol="simple",
                clients=knocking.VISITORS,
                seconds=self._pgbench_seconds,
                reconnects=True,
                cpu=rival.cpu_seconds,
            )
            return _Run(outcome.cpu_microseconds, outcome.rate, 0.0)

        runs, broken = await take_turns(self._arena.proxies(), measure, self._pairs)
        questions.note_broken(self._result, broken)
        self._tell_cost(runs, None)

    def _tell_cost(self, runs: dict[str, list[_Run]], rate: Promise | None) -> None:
        name = self._result.implementation
        table = f"{name[0].upper()}{name[1:]}"
        sheet.tell(
            *(self._result, self._arena, runs, lambda run: run.microseconds),
            table=table,
            what="CPU of the proxy per login",
            unit="µs",
        )
        sheet.tell(
            *(self._result, self._arena, runs, lambda run: run.rate),
            table=table,
            what="logins",
            unit="/s",
            promise=rate,
        )

    async def _ask_tls(self, pool: ProcessPoolExecutor) -> None:
        us = self._arena.contestants[OURS]
        url, path = _url(us), str(self._authority.cert)
        manners = {
            PLAIN: Manner(url),
            FULL: Manner(url, path),
            RESUMED: Manner(url, path, resumes=True),
        }
        # Three ways into the one proxy.
        rivals = [replace(us, name=name) for name in manners]
        runs = await self._knock(pool, rivals, manners)
        table = "A new TLS connection per query, slots in Redis"
        for name, its in runs.items():
            what = f"CPU of the proxy per login, {name}"
            self._own(table, what, "µs", [run.microseconds for run in its])
        shares = [run.resumed * 100 for run in runs[RESUMED]]
        self._own(table, "sessions taken up, of those that clients had", "%", shares)

    async def _knock(
        self,
        pool: ProcessPoolExecutor,
        rivals: Sequence[Contestant],
        manners: Mapping[str, Manner],
    ) -> dict[str, list[_Run]]:
        """Have visitors come and go at each of the rivals, in turn."""

        async def measure(rival: Contestant) -> _Run:
            manner, seconds = manners[rival.name], self._seconds
            before = rival.cpu_seconds()
            count, resumed = await asyncio.to_thread(
                knocking.come_and_go, pool, manner, seconds
            )
            spent = rival.cpu_seconds() - before
            return _Run(spent / count * 1e6, count / seconds, resumed / count)

        for manner in manners.values():
            await asyncio.to_thread(knocking.come_and_go, pool, manner, WARM_UP)
        runs, _ = await take_turns(rivals, measure, self._pairs)
        return runs

    async def _ask_wait(self, urls: Sequence[str]) -> None:
        rivals = self._arena.proxies()
        doors = {each.name: [Door.of(_url(each))] for each in rivals}
        doors[OURS] = [Door.of(url) for url in urls]

        async def arrive(rival: Contestant, seconds: float) -> Arrivals:
            arrivals = await asyncio.to_thread(
                knocking.come_on_time, doors[rival.name], rate=RATE, seconds=seconds
            )
            if arrivals.failures:
                self._result.failures.append(f"{rival.name}: {arrivals.failures[0]}")
            return arrivals

        def wait(percent: float) -> Callable[[Arrivals], float]:
            return lambda arrivals: arrivals.percentile(percent) * 1e3

        for rival in rivals:
            await arrive(rival, WARM_UP)
        seconds = self._seconds
        runs, _ = await take_turns(
            rivals, lambda rival: arrive(rival, seconds), self._pairs
        )
        table = f"Connect to ready, {RATE:.0f} a second, {len(urls)} organisations"
        for percent in PERCENTILES:
            sheet.tell(
                *(self._result, self._arena, runs, wait(percent)),
                table=table,
                what=f"P{percent}",
                unit="ms",
            )
            if percent == JUDGED_PERCENTILE:
                its = self._result.rows[-1]
                its["promise"] = f"< {MAX_WAIT_MS:.0f} ms"
                its["is_kept"] = its["ours"] < MAX_WAIT_MS

    def _own(self, table: str, what: str, unit: str, values: Sequence[float]) -> None:
        own = Own(table, what, unit, statistics.median(values), len(values))
        sheet.note(self._result, own)


def _url(contestant: Contestant) -> str:
    return contestant.urls[PoolMode.TRANSACTION]
