"""The case `endurance`: whether the proxy's memory grows with what it has done.

As much as a day brings: twenty million queries, a hundred thousand connects, ten
thousand organisations, in rounds that are all alike. Each organisation has been there
once before the first round, so that from then on nothing is new but the queries'
texts; what memory grows by from round to round, it would grow by for ever.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich.table import Table

from bench import sheet
from bench.arena import MAKE_TIER, TIER
from bench.case import Case, Result
from bench.sheet import Own
from bench.stack import Organization, Stack
from bench.visitor import Door, Refused, Visitor
from ogelproxy.protocol import messages


@dataclass(frozen=True, slots=True)
class Load:
    """What is done in all rounds together."""

    organizations: int
    rounds: int
    queries: int
    #: Beside one of each organisation before the first round.
    connects: int


FULL = Load(organizations=10_000, rounds=20, queries=20_000_000, connects=100_000)
QUICK = Load(organizations=50, rounds=5, queries=100_000, connects=500)
#: Of all connects one in so many is of an organisation that was away for long; the
#: others are of the first `REGULARS`.
RARE = 5
REGULARS = 100
#: Rounds before the first that counts: caches fill, files take their size.
SETTLING_ROUNDS = 3
#: Clients that send queries, and queries of one batch of theirs.
ASKERS, BATCH = 4, 200
#: Seconds in a round's end in which servers close and usage goes its way.
REST, QUICK_REST = 3.0, 0.5
#: Share of the memory after the first rounds by which the others may raise it, as the
#: median of the slopes between all pairs of rounds has it (Theil and Sen): a round that
#: happened to be large doesn't move it.
MAX_GROWTH = 0.02
SETTINGS = {
    # Ten thousand pools on one Postgres: each has its servers only while it needs them.
    "OGELPROXY_POOL_MAX_SERVERS": "4",
    "OGELPROXY_POOL_MAX_SERVERS_PER_ADDRESS": "200",
    "OGELPROXY_POOL_SERVER_IDLE_TIMEOUT": "1",
    # A busy machine is not an outage: leases are waited for.
    "OGELPROXY_REDIS_TIMEOUT": "10",
    # A line for each of the logins would be the disk's endurance.
    "O7S_LOG_LEVEL": "warning",
}
#: Makes organisations like the one that is named, with its key and its database.
MAKE_LIKE = (
    "INSERT INTO platform.organizations "
    "(handle, name, tier, scram_salt, scram_iterations) "
    "SELECT $1 || '_' || number, name, tier, scram_salt, scram_iterations "
    "FROM platform.organizations, generate_series(1, $2::integer) AS number "
    "WHERE handle = $1",
    "INSERT INTO platform.api_keys (org_id, name, stored_key, server_key, prefix) "
    "SELECT made.id, key.name, stored_key, server_key, prefix "
    "FROM platform.organizations AS made, platform.organizations AS model "
    "JOIN platform.api_keys AS key ON key.org_id = model.id "
    "WHERE model.handle = $1 AND made.handle LIKE $1 || '\\_%' AND $2 > 0",
    "INSERT INTO platform.database_credentials "
    "(org_id, name, database_type, connection_string, pool_mode) "
    "SELECT made.id, data.name, database_type, connection_string, pool_mode "
    "FROM platform.organizations AS made, platform.organizations AS model "
    "JOIN platform.database_credentials AS data ON data.org_id = model.id "
    "WHERE model.handle = $1 AND made.handle LIKE $1 || '\\_%' AND $2 > 0",
)
BILLED = "SELECT coalesce(sum(query_count), 0) FROM platform.usage_metrics"
#: Execute of the unnamed portal, without a bound on its rows.
USE = messages.message(b"E", bytes(5))
#: What answers a batch: ParseComplete; for each use BindComplete, a DataRow of "1" and
#: CommandComplete; CloseComplete and ReadyForQuery.
ANSWER_BYTES = 5 + BATCH * (5 + 12 + len(b"C????SELECT 1\0")) + 5 + 6
TABLE = "Memory of a process over rounds of a day's work"


class EnduranceCase(Case):
    name = "endurance"
    about = "memory over a day's queries, connects and organisations"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return ["a day's work"]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_run(result, Path(directory), is_quick))
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        rounds = Table(title="Memory of the proxy, round by round")
        for name in ("round", "queries so far", "connects so far", "resident"):
            rounds.add_column(name, justify="right")
        for row in (row for result in results for row in result.rows):
            if "round" in row:
                rounds.add_row(
                    *(f"{row['round']}", f"{row['queries']:,}"),
                    *(f"{row['connects']:,}", f"{row['bytes'] / 1e6:.1f} MB"),
                )
        return [*sheet.tables(results), rounds]


CASE = EnduranceCase()


async def _run(result: Result, directory: Path, is_quick: bool) -> None:
    load = QUICK if is_quick else FULL
    stack = Stack(directory, workers=1, settings=SETTINGS, has_history=False)
    # Not by the stack's link to it, whose time would be ours.
    stack.settings["REDIS_URL"] = stack.valkey.url
    async with stack:
        await stack.store.pool.execute(MAKE_TIER, TIER)
        [model] = await stack.make([TIER])
        for statement in MAKE_LIKE:
            await stack.store.pool.execute(statement, model.handle, load.organizations)
        rest = QUICK_REST if is_quick else REST
        work = _Work(result, stack, model, load, rest)
        await asyncio.to_thread(work.run)
        await stack.stop_proxy()  # which delivers what it has counted
        billed = int(await stack.store.pool.fetchval(BILLED))
    if billed != work.queries:
        result.failures.append(f"{work.queries} queries were made, {billed} billed")
    _judge(result, is_quick=is_quick)


class _Work:
    """A day's work on one proxy; `run` does it and notes memory after each round."""

    def __init__(
        self, result: Result, stack: Stack, model: Organization, load: Load, rest: float
    ) -> None:
        self._result = result
        self._load = load
        self._rest = rest
        [pid] = stack.pids()
        self._process = psutil.Process(pid)
        self._model = Door.of(stack.url(model))
        self._texts = itertools.count()  # no two statements of a day are the same
        self._turns = itertools.cycle(range(1, load.organizations + 1))
        self.queries = 0  # made so far
        self._connects = 0

    def run(self) -> None:
        load = self._load
        for number in range(1, load.organizations + 1):
            self._visit(number)
        askers = [Visitor(self._model).enter() for _ in range(ASKERS)]
        self._note(0)
        for number in range(1, load.rounds + 1):
            for visit in range(load.connects // load.rounds):
                if visit % RARE:
                    self._visit(visit % min(REGULARS, load.organizations) + 1)
                else:
                    self._visit(next(self._turns))
            batches = load.queries // load.rounds // (ASKERS * BATCH)
            for _ in range(batches):
                for asker in askers:
                    asker.send(_batch(next(self._texts)))
                for asker in askers:
                    asker.skip(ANSWER_BYTES)
            self.queries += (
                load.queries // load.rounds // (ASKERS * BATCH) * ASKERS * BATCH
            )
            time.sleep(self._rest)
            self._note(number)
        for asker in askers:
            asker.leave()

    def _visit(self, number: int) -> None:
        visitor = Visitor(replace(self._model, user=f"{self._model.user}_{number}"))
        self._connects += 1
        try:
            visitor.enter()
            visitor.ask("SELECT 1")
            self.queries += 1
        except Refused as refused:
            # Told at the end: the rounds before it are worth their figures.
            self._result.failures.append(f"visit {self._connects}: {refused}")
        finally:
            visitor.leave()

    def _note(self, number: int) -> None:
        self._result.rows.append(
            {
                "round": number,
                "queries": self.queries,
                "connects": self._connects,
                "bytes": self._process.memory_info().rss,
                "at": time.monotonic(),
            }
        )


def _batch(number: int) -> bytes:
    """Return a statement's Parse, `BATCH` times its use, its Close, and a Sync."""
    name = b"statement\0"
    use = messages.message(b"B", b"\0" + name + bytes(6)) + USE
    return b"".join(
        (
            messages.message(b"P", name + b"SELECT 1 AS column_%d\0\0\0" % number),
            use * BATCH,
            messages.message(b"C", b"S" + name),
            messages.message(b"S", b""),
        )
    )


def _judge(result: Result, *, is_quick: bool) -> None:
    first, *_ = rounds = [row["bytes"] for row in result.rows][SETTLING_ROUNDS:]
    slopes = [
        (after - before) / (then - now)
        for (now, before), (then, after) in itertools.combinations(enumerate(rounds), 2)
    ]
    slope = statistics.median(slopes)
    growth = slope * (len(rounds) - 1)
    last = result.rows[-1]
    result.figures |= {
        "queries": last["queries"],
        "connects": last["connects"],
        "seconds": last["at"] - result.rows[0]["at"],
        "memory before, bytes": first,
        "growth, bytes": growth,
    }
    per_million = slope / (last["queries"] - result.rows[-2]["queries"]) * 1e6
    is_flat = None if is_quick else growth <= MAX_GROWTH * first
    for what, unit, value, promise in (
        ("resident after the first rounds", "MB", first / 1e6, ""),
        ("growth per million queries", "kB", per_million / 1e3, ""),
        (
            "growth over all later rounds",
            "%",
            growth / first * 100,
            f"≤ {MAX_GROWTH:.0%}",
        ),
    ):
        kept = is_flat if promise else None
        sheet.note(result, Own(TABLE, what, unit, value, 1, promise, kept))
    if is_flat is False:
        result.failures.append(f"memory grew by {growth / first:.1%}")
