"""The case `coldstart`: how soon there is an answer where something was not there yet.

The proxy itself, from its start; a tenant that nobody has asked for; and Postgres,
which was away for a moment. Answers are to visitors who try again all the time.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bench import sheet
from bench.arena import MAKE_TIER, TIER
from bench.case import Case, Result
from bench.sheet import Own
from bench.stack import Stack
from bench.visitor import Door, Refused, Visitor

START, TENANT, RETURN = "the proxy starts", "a new tenant", "Postgres returns"
TIMES, QUICK_TIMES = 10, 2
TENANTS, QUICK_TENANTS = 100, 10
#: Seconds until who was turned away tries again, and until it gives up.
RETRY_INTERVAL = 0.002
PATIENCE = 30.0
QUERY = "SELECT 1"
PERCENTILES = (50, 95)
#: Milliseconds from connect to ready of a tenant that is known, at P95; spec section 9.
MAX_WARM_MS = 50.0


class ColdstartCase(Case):
    name = "coldstart"
    about = "how soon there is an answer: after a start, for a new tenant"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [START, TENANT, RETURN]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = Result(self.name, implementation)
        with tempfile.TemporaryDirectory() as directory:
            # Whom root's servers run as may walk through it.
            Path(directory).chmod(0o711)
            asyncio.run(_run(result, Path(directory), is_quick))
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        return sheet.tables(results)


CASE = ColdstartCase()


async def _run(result: Result, directory: Path, is_quick: bool) -> None:
    stack = Stack(directory, workers=1, has_history=False)
    # Not by the stack's link to it, whose time would be ours.
    stack.settings["REDIS_URL"] = stack.valkey.url
    async with stack:
        await stack.store.pool.execute(MAKE_TIER, TIER)
        times = QUICK_TIMES if is_quick else TIMES
        if result.implementation == START:
            await _start(stack, result, times)
        elif result.implementation == RETURN:
            await _return(stack, result, times)
        else:
            count = QUICK_TENANTS if is_quick else TENANTS
            await _tenants(stack, result, count)


async def _start(stack: Stack, result: Result, times: int) -> None:
    """Start it again and again; from the start of its process to an answer."""
    [organization] = await stack.make([TIER])
    door = Door.of(stack.url(organization))
    await asyncio.to_thread(_first_answer, door)
    waits = []
    for _ in range(times):
        await stack.stop_proxy()
        begin = time.monotonic()
        answer = asyncio.create_task(asyncio.to_thread(_first_answer, door))
        await stack.start_proxy()
        waits.append(await answer - begin)
    what = "from `ogelproxy serve` to the first answer"
    sheet.note(
        result, Own("A start", what, "ms", statistics.median(waits) * 1e3, times)
    )


async def _return(stack: Stack, result: Result, times: int) -> None:
    """Stop Postgres and start it; from its first answer to one through the proxy."""
    [organization] = await stack.make([TIER])
    door, direct = (
        Door.of(url) for url in (stack.url(organization), stack.postgres.dsn())
    )
    waits = []
    for _ in range(times):
        await asyncio.to_thread(_first_answer, door)
        await stack.postgres.stop()
        away = asyncio.create_task(asyncio.to_thread(_first_answer, door))
        there = asyncio.create_task(asyncio.to_thread(_first_answer, direct))
        await stack.postgres.start()
        waits.append(max(0.0, await away - await there))
    what = "from Postgres's first answer to one through the proxy"
    sheet.note(
        result, Own("An outage", what, "ms", statistics.median(waits) * 1e3, times)
    )


async def _tenants(stack: Stack, result: Result, count: int) -> None:
    """Let tenants in who were never there, and who were; connect to ready."""
    first, *made = await stack.make([TIER] * (count + 1))
    # The very first one finds more that is not there yet.
    await asyncio.to_thread(_first_answer, Door.of(stack.url(first)))
    doors = [Door.of(stack.url(each)) for each in made]
    for door, organization in zip(doors, made, strict=True):
        # What visitors do once is not what is measured.
        door.derive(*await stack.store.fetch_scram(organization.handle))
    for what in ("known to nobody, no server", "in memory, a server is there"):
        _note(result, what, await asyncio.to_thread(_enter_each, doors))
    await stack.stop_proxy()
    await stack.start_proxy()
    waits = await asyncio.to_thread(_enter_each, doors)
    _note(result, "known to Redis, no server", waits)


def _note(result: Result, what: str, waits: list[float]) -> None:
    waits.sort()
    for percent in PERCENTILES:
        value = waits[max(0, -(-percent * len(waits) // 100) - 1)] * 1e3
        is_judged = percent == 95 and what.startswith("in memory")
        sheet.note(
            result,
            Own(
                *("Connect to ready", f"{what}, P{percent}", "ms", value),
                runs=1,
                promise=f"< {MAX_WARM_MS:.0f} ms" if is_judged else "",
                is_kept=value < MAX_WARM_MS if is_judged else None,
            ),
        )


def _enter_each(doors: Sequence[Door]) -> list[float]:
    """Return the seconds from connect to ready at each door, one after the other."""
    waits = []
    for door in doors:
        visitor = Visitor(door)
        begin = time.perf_counter()
        visitor.enter()
        waits.append(time.perf_counter() - begin)
        visitor.ask(QUERY)
        visitor.leave()
    return waits


def _first_answer(door: Door) -> float:
    """Try until a query is answered; return when it was."""
    end = time.monotonic() + PATIENCE
    while True:
        visitor = Visitor(door)
        try:
            visitor.enter()
            visitor.ask(QUERY)
        except (OSError, Refused):
            if time.monotonic() > end:
                raise
            time.sleep(RETRY_INTERVAL)
        else:
            return time.monotonic()
        finally:
            visitor.leave()
