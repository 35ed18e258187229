"""Metrics: what is watched. One registry per Engine, every metric declared here.

Whoever counts on the hot path keeps plain integers and offers a source, a
callable that says what they are now; they are added up when somebody looks.
Labels come from closed sets: kinds, codes, tiers, database types, never from
what a client sends. What is billed is `usage`.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from ogelproxy.errors import OgelError

#: Upper bounds of the latency buckets in seconds; one more bucket has none.
LATENCY_BOUNDS = (
    *(50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 15e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0),
)

LoginResult = Literal["accepted", "rejected"]

#: Of the text that is rendered.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

#: Values of a metric's labels, in their declared order.
Values = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric: what it means and the names of its labels, in order."""

    text: str
    labels: tuple[str, ...] = ()
    #: Of a gauge: what several workers that tell of it come to together.
    together: Callable[[float, float], float] = operator.add


LATENCY = "o7s_latency_seconds"
REFUSALS = "o7s_refusals_total"
LOGINS = "o7s_logins_total"
PINS = "o7s_pins_total"

LATENCY_DECLARED = Declared(
    "From a query's arrival to the end of its answer.", ("tier", "database_type")
)
COUNTERS = {
    "o7s_requests_total": Declared("Queries answered.", ("tier", "database_type")),
    REFUSALS: Declared("Errors told to clients.", ("kind", "code")),
    LOGINS: Declared("Logins that ended.", ("result",)),
    PINS: Declared("Times that a client was pinned to its server.", ("reason",)),
    "o7s_throttled_total": Declared(
        "Queries that met the rate limit.", ("tier", "outcome")
    ),
    "o7s_in_flight_waits_total": Declared(
        "Queries that waited for others of their organisation in flight.", ("tier",)
    ),
    "o7s_servers_moved_total": Declared(
        "Server connections closed so that another database could have one."
    ),
    "o7s_bytes_total": Declared("Bytes relayed.", ("direction",)),
    "o7s_lease_requests_total": Declared("Leases asked of Redis.", ("answered",)),
    "o7s_notifications_total": Declared("Notifications given to listening clients."),
    "o7s_tenant_lookups_total": Declared(
        "Tenant records looked up, by who answered.", ("from",)
    ),
    "o7s_usage_delivered_batches_total": Declared("Usage batches delivered."),
    "o7s_worker_restarts_total": Declared("Workers that ended unasked."),
    "o7s_worker_silences_total": Declared("Questions that a worker did not answer."),
    "o7s_events_dropped_total": Declared("Events that found no room on the disk."),
}
GAUGES = {
    "o7s_clients": Declared("Clients that are logged in."),
    "o7s_servers": Declared("Server connections.", ("state",)),
    "o7s_circuit_open": Declared(
        "Databases that new servers are not opened to.", ("database_type",), max
    ),
    "o7s_listening_clients": Declared("Clients that share a listening connection."),
    "o7s_channels": Declared("Channels that they listen to."),
    "o7s_kept_notifications": Declared("Notifications that wait for their clients."),
    "o7s_pinned_clients": Declared("Clients pinned to their server connection."),
    "o7s_waiting_clients": Declared("Clients waiting for a server connection."),
    "o7s_tenants_cached": Declared("Tenant records in memory."),
    "o7s_tenants_unproven": Declared(
        "Of those, which Redis gave and the control plane has not confirmed."
    ),
    "o7s_usage_spooled_batches": Declared("Usage batches waiting for delivery."),
    "o7s_usage_spool_bytes": Declared("Bytes of the usage spool in use."),
    "o7s_usage_spool_limit_bytes": Declared("Bytes that the usage spool may take."),
    "o7s_control_up": Declared(
        "Whether the control plane answers: 1 or 0.", together=min
    ),
    "o7s_redis_up": Declared("Whether Redis answers: 1 or 0.", together=min),
    "o7s_unproven_connections": Declared(
        "Connections whose slot Redis may have given to others meanwhile."
    ),
    "o7s_workers": Declared("Worker processes that accept clients."),
}
DECLARED = COUNTERS | GAUGES


@dataclass(frozen=True, slots=True)
class CounterSample:
    """What a counter says now; it has exactly the labels that are declared."""

    name: str
    labels: Mapping[str, str]
    value: float

    def __post_init__(self) -> None:
        _check(COUNTERS, self.name, self.labels)


@dataclass(frozen=True, slots=True)
class GaugeSample:
    """What a gauge says now; it has exactly the labels that are declared."""

    name: str
    labels: Mapping[str, str]
    value: float

    def __post_init__(self) -> None:
        _check(GAUGES, self.name, self.labels)


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Latencies of one tier and database type.

    `counts` holds a number per bound and one for what is slower than all, not
    cumulative; `seconds` is the sum of the latencies.
    """

    tier: str
    database_type: str
    counts: Sequence[int]
    seconds: float

    def __post_init__(self) -> None:
        buckets = len(LATENCY_BOUNDS) + 1
        if len(self.counts) != buckets:
            raise ValueError(f"{LATENCY} has {buckets} buckets, not {len(self.counts)}")


Sample = CounterSample | GaugeSample | LatencySample
Source = Callable[[], Iterable[Sample]]


def _check(
    declared: Mapping[str, Declared], name: str, labels: Mapping[str, str]
) -> None:
    if name not in declared or labels.keys() != set(declared[name].labels):
        raise ValueError(f"{name} with labels {sorted(labels)} is not declared")


class Totals:
    """Samples added up, by metric and labels; of one process, or of several."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Values, float]] = {name: {} for name in DECLARED}
        self._counts: dict[Values, Sequence[int]] = {}  # of the latency buckets
        self._seconds: dict[Values, float] = defaultdict(float)

    def add(self, sample: Sample) -> None:
        """Add what one part of a process says."""
        if isinstance(sample, LatencySample):
            values: Values = (sample.tier, sample.database_type)
            self._add_latencies(values, sample.counts, sample.seconds)
        else:
            declared = DECLARED[sample.name]
            values = tuple(sample.labels[name] for name in declared.labels)
            sums = self._sums[sample.name]
            sums[values] = sums.get(values, 0.0) + sample.value

    def pack(self) -> dict[str, Any]:
        """Return it as JSON knows it, for `merge` in another process."""
        return {
            "sums": {name: list(sums.items()) for name, sums in self._sums.items()},
            "latencies": [
                (values, counts, self._seconds[values])
                for values, counts in self._counts.items()
            ],
        }

    def merge(self, packed: Mapping[str, Any], *, with_gauges: bool = True) -> None:
        """Add what a whole process packed; `with_gauges` as long as it lives.

        It may be of another version: what is declared otherwise here is left out.
        """
        for values, counts, seconds in packed["latencies"]:
            if len(counts) == len(LATENCY_BOUNDS) + 1:
                self._add_latencies(tuple(values), counts, seconds)
        for name, pairs in packed["sums"].items():
            if name in COUNTERS or (with_gauges and name in GAUGES):
                sums, declared = self._sums[name], DECLARED[name]
                for values, value in pairs:
                    if len(values) == len(declared.labels):
                        known = sums.get(tuple(values))
                        sums[tuple(values)] = (
                            value if known is None else declared.together(known, value)
                        )

    def _add_latencies(
        self, values: Values, counts: Sequence[int], seconds: float
    ) -> None:
        known = self._counts.get(values, [0] * len(counts))
        self._counts[values] = [a + b for a, b in zip(known, counts, strict=True)]
        self._seconds[values] += seconds

    def families(self) -> Iterator[Metric]:
        """Yield all of it as the Prometheus client wants it."""
        yield _histogram(self._counts, self._seconds)
        for name, declared in DECLARED.items():
            kind = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            family = kind(name, declared.text, labels=declared.labels)
            for values, total in self._sums[name].items():
                family.add_metric(values, total)
            yield family

    def render(self) -> bytes:
        """Return it in Prometheus' text format 0.0.4."""
        registry = CollectorRegistry()
        registry.register(Folding(lambda: self))
        return generate_latest(registry)


class Metrics:
    """Everything that one Engine tells Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sources: list[Source] = [self._own]  # asked at every scrape
        self._refusals: Counter[tuple[str, str]] = Counter()  # by kind and code
        self._logins: Counter[LoginResult] = Counter()
        self._pins: Counter[str] = Counter()  # by reason
        self.registry.register(Folding(self.totals))

    def add_source(self, source: Source) -> None:
        """Ask `source` at every scrape; samples of one name and labels are added."""
        self._sources.append(source)

    def refused(self, error: OgelError) -> None:
        """Count an error that a client is told."""
        self._refusals[error.kind, error.code] += 1

    def login(self, result: LoginResult) -> None:
        """Count a login that has ended."""
        self._logins[result] += 1

    def pinned(self, reason: str) -> None:
        """Count a reason for which a client keeps its server."""
        self._pins[reason] += 1

    def totals(self) -> Totals:
        """Return what all sources say now."""
        totals = Totals()
        for source in self._sources:
            for sample in source():
                totals.add(sample)
        return totals

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _own(self) -> Iterator[Sample]:
        for (kind, code), count in self._refusals.items():
            yield CounterSample(REFUSALS, {"kind": kind, "code": code}, count)
        for result in get_args(LoginResult):
            yield CounterSample(LOGINS, {"result": result}, self._logins[result])
        for reason, count in self._pins.items():
            yield CounterSample(PINS, {"reason": reason}, count)


class Folding(Collector):
    """What the registry asks for the totals."""

    def __init__(self, totals: Callable[[], Totals]) -> None:
        self._totals = totals

    def describe(self) -> Iterable[Metric]:
        # The registry would collect instead, and sources aren't ready when asked.
        return ()

    def collect(self) -> Iterator[Metric]:
        return self._totals().families()


def _histogram(
    counts: Mapping[Values, Sequence[int]], seconds: Mapping[Values, float]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        LATENCY, LATENCY_DECLARED.text, labels=LATENCY_DECLARED.labels
    )
    bounds = (*map(str, LATENCY_BOUNDS), "+Inf")
    for values, of_buckets in counts.items():
        cumulative = list(zip(bounds, accumulate(of_buckets), strict=True))
        family.add_metric(values, cumulative, seconds[values])
    return family
