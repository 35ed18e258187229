"""The case `limits`: is a limit ever exceeded, is it usable, what does it cost?

A trial is some hosts, processes of their own with a real Limiter each, in front of
a real Valkey, under one load. What each admitted and when, by the one monotonic
clock of the machine, goes before the judge. Trials with faults lose Redis, hosts and
time; controls have a known mistake built in and must be seen to break the limit,
under the same loads, as the proof that it would be noticed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bench import proxied
from bench.case import Case, Result
from bench.host import TenantSpec
from bench.trial import Fault, Outcome, Trial, run

RATES = (5.0, 10.0, 50.0, 200.0, 1000.0, 2000.0)
QUICK_RATES = (10.0, 200.0, 1000.0)
HOSTS = (1, 2, 4)
LOADS = ("flat", "pulsed", "spiky", "light")
#: Seconds that a query may wait for a token.
WAITS = (0.0, 0.1)

#: Names of figures.
EXCESS = "worst excess, tokens"
SHARE = "least share of the allowance"
CALLS = "most calls/s of an organisation"

#: Trials with clients and the whole proxy, and how many workers.
THROUGH = "clients through "
THROUGH_SECONDS = 15.0

#: Rounding of sums of thousands of fractions, in tokens.
ROUNDING = 1e-6
#: What spec and limits.md ask for.
MIN_SHARE = 0.95
#: Seconds in which twice the limit uses up a bucket of one second, and some more.
BURST = 2.0
#: Seconds in which all leases have run out that were granted before.
RUN_OUT = 1.1
MAX_CALLS = 60.0  # per second, of one organisation over all hosts

#: In the order in which they strike; seconds since the begin.
FAULTS = (
    # First: who is new to a Redis that lost its memory has no part in the floor yet.
    Fault(2.0, "cut redis", 3.0),
    Fault(7.0, "kill redis"),
    Fault(10.5, "kill host"),
    Fault(12.5, "freeze host", 3.0),
    Fault(17.5, "delay redis", 2.0),
    Fault(21.5, "cut one host", 2.0),
)
FAULTY_SECONDS = 26.0
QUICK_FAULTS = (
    Fault(1.0, "kill redis"),
    Fault(3.0, "kill host"),
    Fault(4.5, "freeze host", 3.0),
    Fault(7.8, "delay redis", 0.7),
    Fault(9.0, "cut redis", 0.7),
)
QUICK_FAULTY_SECONDS = 10.5
CONTROL_TRIES = 3
CONTROL_SETTLE = 0.5
#: While a host is frozen, what it holds must run out (`loads.teased`).
FROZEN = (Fault(4.2, "freeze host", 4.45),)


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one organisation in one trial."""

    rate: float
    capacity: float
    max_wait: float
    load: str
    excess: float  # tokens of the worst window; above 0 the limit was broken
    share: float  # of what load and limit allowed
    #: The same once the burst at the begin is over; only of the load `flat`.
    steady: float | None
    #: Of the rate, while Redis is away and leases have run out; where that is so.
    away: float | None
    admitted: int
    calls_per_second: float  # to Redis, of all hosts
    calls_per_query: float  # admitted or not


def trials(*, is_quick: bool) -> dict[str, Trial]:
    """Name all trials, in order."""
    named = {}
    rates = QUICK_RATES if is_quick else RATES
    for hosts in (2,) if is_quick else HOSTS:
        for load in ("flat",) if is_quick else LOADS:
            named[f"{load}, {_workers(hosts)}"] = Trial(
                _tenants(rates, load), hosts, 6.0 if is_quick else 10.0
            )
        for load in ("heavy",) if is_quick else ("flat", "pulsed", "spiky"):
            named[f"{load} with faults, {_workers(hosts)}"] = Trial(
                _tenants(rates, load),
                hosts,
                QUICK_FAULTY_SECONDS if is_quick else FAULTY_SECONDS,
                faults=QUICK_FAULTS if is_quick else FAULTS,
            )
    if not is_quick:
        named["heavy, buckets of 5 s, 4 workers"] = Trial(_bursting(RATES), 4, 10.0)
        named["flat with faults, no floor, 2 workers"] = Trial(
            _tenants(RATES, "flat"), 2, FAULTY_SECONDS, faults=FAULTS, floor=0.0
        )
        named["flat, no Redis, 1 worker"] = Trial(
            _tenants(rates, "flat"), 1, 8.0, has_redis=False
        )
        named["teased with a freeze, 2 workers"] = Trial(
            _tenants((50.0, 1000.0), "teased"), 2, 9.5, faults=FROZEN
        )
    few = (50.0, 1000.0)
    named["control: no learning mode"] = Trial(
        # Buckets that hold more than hosts lose while Redis is away.
        _bursting(few),
        2,
        6.0,
        control="no learning mode",
        settle=CONTROL_SETTLE,
        faults=(Fault(2.5, "kill redis"),),
    )
    named["control: outstanding leases ignored"] = Trial(
        _tenants(few, "teased"),
        2,
        5.0,
        control="outstanding leases ignored",
        settle=CONTROL_SETTLE,
    )
    named["control: expiry not checked"] = Trial(
        _tenants(few, "teased"),
        2,
        9.5,
        control="expiry not checked",
        settle=CONTROL_SETTLE,
        faults=FROZEN,
    )
    return named


def _workers(hosts: int) -> str:
    return f"{hosts} worker{'s' if hosts > 1 else ''}"


def _tenants(rates: Sequence[float], load: str) -> list[TenantSpec]:
    return [
        TenantSpec(f"org_{rate:g}_{wait * 1000:g}", rate, False, wait, load)
        for rate in rates
        for wait in WAITS
    ]


def _bursting(rates: Sequence[float]) -> list[TenantSpec]:
    return [TenantSpec(f"org_{rate:g}", rate, True, 0.1, "heavy") for rate in rates]


class LimitsCase(Case):
    name = "limits"
    about = "never over, usable, cheap: the limiter over processes, with faults"

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        through = [] if is_quick else [THROUGH + _workers(hosts) for hosts in HOSTS]
        return [*trials(is_quick=is_quick), *through]

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        if implementation.startswith(THROUGH):
            return self._run_through(implementation)
        trial = trials(is_quick=is_quick)[implementation]
        # That a machine is busy may hide a mistake once, but not always.
        for _ in range(CONTROL_TRIES if trial.control else 1):
            outcome = run(trial)
            rows = [_row(trial, outcome, n) for n in range(len(trial.tenants))]
            failures = _failures(trial, rows)
            if not failures:
                break
        result = Result(self.name, implementation)
        result.figures = {
            EXCESS: max(row.excess for row in rows),
            SHARE: min(row.share for row in rows),
            CALLS: max(row.calls_per_second for row in rows),
        }
        result.rows = [_json(trial, row) for row in rows]
        result.failures = [f"{implementation}: {failure}" for failure in failures]
        return result

    def _run_through(self, implementation: str) -> Result:
        hosts = int(implementation.removeprefix(THROUGH).split()[0])
        passages = proxied.run(hosts, THROUGH_SECONDS)
        result = Result(self.name, implementation)
        result.figures = {
            EXCESS: max(each.excess for each in passages),
            SHARE: min(each.admitted / each.allowed for each in passages),
        }
        result.rows = [
            {"hosts": hosts, "control": None, "load": "clients", **asdict(each)}
            for each in passages
        ]
        for each in passages:
            if each.excess > proxied.ROUNDING:
                result.failures.append(
                    f"{implementation}: r={each.rate:g} was exceeded by "
                    f"{each.excess:.3f}"
                )
            if each.errors:
                result.failures.append(f"{implementation}: {each.errors} errors")
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        return [_by_rate(results), _by_trial(results)]


CASE = LimitsCase()


def _row(trial: Trial, outcome: Outcome, number: int) -> Row:
    tenant = trial.tenants[number]
    times = outcome.admitted[number]
    demand = outcome.demand[number]
    usable = min(demand, tenant.capacity + tenant.rate * trial.seconds)
    calls = outcome.calls[number]
    return Row(
        rate=tenant.rate,
        capacity=tenant.capacity,
        max_wait=tenant.max_wait,
        load=tenant.load,
        excess=outcome.excess(trial, number),
        share=len(times) / usable,
        steady=_steady(trial, outcome, number) if tenant.load == "flat" else None,
        away=_away(trial, outcome, number),
        admitted=len(times),
        calls_per_second=calls / trial.seconds,
        calls_per_query=calls / demand,
    )


def _steady(trial: Trial, outcome: Outcome, number: int) -> float:
    since = outcome.begin + BURST
    admitted = sum(time >= since for time in outcome.admitted[number])
    return admitted / (trial.tenants[number].rate * (trial.seconds - BURST))


def _away(trial: Trial, outcome: Outcome, number: int) -> float | None:
    for fault in trial.faults:
        if fault.kind == "cut redis" and fault.seconds > RUN_OUT:
            since = outcome.begin + fault.at + RUN_OUT
            until = outcome.begin + fault.at + fault.seconds
            admitted = sum(since <= time < until for time in outcome.admitted[number])
            return admitted / (trial.tenants[number].rate * (until - since))
    return None


def _failures(trial: Trial, rows: Sequence[Row]) -> list[str]:
    if trial.control is not None:
        if max(row.excess for row in rows) < 1:
            return ["the mistake was not seen, so the trials prove nothing"]
        return []
    failures = [
        f"r={row.rate:g} was exceeded by {row.excess:.3f}"
        for row in rows
        if row.excess > ROUNDING
    ]
    if trial.faults or not trial.has_redis:
        return failures
    if not all(row.calls_per_second for row in rows):
        failures.append("no call of Redis was counted: mend CountingRedis")
    for row in rows:
        if row.max_wait and row.steady is not None and row.steady < MIN_SHARE:
            failures.append(f"r={row.rate:g}: {row.steady:.1%} of it was usable")
        if row.calls_per_second > MAX_CALLS:
            failures.append(f"r={row.rate:g}: {row.calls_per_second:.0f} calls/s")
    return failures


def _json(trial: Trial, row: Row) -> dict[str, Any]:
    return {
        "hosts": trial.hosts,
        "faults": len(trial.faults),
        "control": trial.control,
        "redis": trial.has_redis,
        "floor": trial.floor,
    } | {name: getattr(row, name) for name in Row.__slots__}


def _by_rate(results: Sequence[Result]) -> Table:
    """Summarise all trials but controls, a row per limit and number of workers."""
    table = Table(title="The limit r, over all loads and faults")
    for column in (
        *("workers", "r", "worst excess", "share, waiting 100 ms"),
        *("share, refusing", "calls/s", "calls per query", "rate, Redis away"),
    ):
        table.add_column(column, justify="right")
    rows = [row for result in results for row in result.rows if not row["control"]]
    for hosts, rate in sorted({(row["hosts"], row["rate"]) for row in rows}):
        own = [row for row in rows if (row["hosts"], row["rate"]) == (hosts, rate)]
        flat = [
            row
            for row in own
            if row["load"] == "flat" and not row["faults"] and row["redis"]
        ]
        away = [
            row["away"] for row in own if row.get("away") is not None and row["floor"]
        ]
        table.add_row(
            f"{hosts}",
            f"{rate:g}",
            f"{max(row['excess'] for row in own):.2f}",
            _median([row["steady"] for row in flat if row["max_wait"]], "{:.1%}"),
            _median([row["steady"] for row in flat if not row["max_wait"]], "{:.1%}"),
            _median([row["calls_per_second"] for row in flat], "{:.1f}"),
            _median([row["calls_per_query"] for row in flat], "{:.4f}"),
            _median(away, "{:.1%}"),
        )
    return table


def _by_trial(results: Sequence[Result]) -> Table:
    table = Table(title="The trials; a control has to be over")
    table.add_column("trial")
    for column in ("worst excess", "least share", "most calls/s"):
        table.add_column(column, justify="right")
    for result in results:
        excess, calls = result.figures[EXCESS], result.figures.get(CALLS)
        is_control = any(row["control"] for row in result.rows)
        is_right = (excess >= 1) if is_control else (excess <= ROUNDING)
        colour = "green" if is_right else "red"
        if any(row.get("faults") for row in result.rows):
            calls = None  # those of hosts that were killed are not known
        table.add_row(
            result.implementation,
            f"[{colour}]{excess:+.2f}[/]",
            f"{result.figures[SHARE]:.1%}",
            "-" if calls is None else f"{calls:.1f}",
        )
    return table


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else "-"
