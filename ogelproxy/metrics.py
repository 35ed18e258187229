"""Metrics: what is watched. One registry per Engine, every metric declared here.

Whoever counts on the hot path keeps plain integers and offers a source, a
callable that says what they are now; they are added up when somebody looks.
Labels come from closed sets: kinds, codes, tiers, database types, never from
what a client sends. What is billed is `usage`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

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

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric: what it means and the names of its labels, in order."""

    text: str
    labels: Labels = ()


REQUESTS = "o7s_requests_total"
LATENCY = "o7s_latency_seconds"
REFUSALS = "o7s_refusals_total"
LOGINS = "o7s_logins_total"

HISTOGRAMS = {
    LATENCY: Declared(
        "From a query's arrival to the end of its answer.", ("tier", "database_type")
    ),
}
COUNTERS = {
    REQUESTS: Declared("Queries answered.", ("tier", "database_type")),
    REFUSALS: Declared("Errors told to clients.", ("kind", "code")),
    LOGINS: Declared("Logins that ended.", ("result",)),
    "o7s_throttled_total": Declared(
        "Queries that met the rate limit.", ("tier", "mode")
    ),
    "o7s_bytes_total": Declared("Bytes relayed.", ("direction",)),
    "o7s_usage_delivered_batches_total": Declared("Usage batches delivered."),
}
GAUGES = {
    "o7s_clients": Declared("Clients that are logged in."),
    "o7s_servers": Declared("Server connections.", ("state",)),
    "o7s_waiting_clients": Declared("Clients waiting for a server connection."),
    "o7s_tenants_cached": Declared("Tenant records in memory."),
    "o7s_usage_spooled_batches": Declared("Usage batches waiting for delivery."),
    "o7s_control_up": Declared("Whether the control plane answers: 1 or 0."),
}


@dataclass(frozen=True, slots=True)
class CounterSample:
    """What a counter says now; `labels` are values in their declared order."""

    name: str
    labels: Labels
    value: float

    def __post_init__(self) -> None:
        _check(COUNTERS, self.name, self.labels)


@dataclass(frozen=True, slots=True)
class GaugeSample:
    """What a gauge says now; `labels` are values in their declared order."""

    name: str
    labels: Labels
    value: float

    def __post_init__(self) -> None:
        _check(GAUGES, self.name, self.labels)


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Latencies of one tier and database type; each one is also a request.

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


def _check(declared: Mapping[str, Declared], name: str, labels: Labels) -> None:
    if name not in declared or len(labels) != len(declared[name].labels):
        raise ValueError(f"{name} with {len(labels)} labels is not declared")


class Metrics:
    """Everything that one Engine tells Prometheus."""

    #: Of what `render` returns.
    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sources: list[Source] = [self._own]  # asked at every scrape
        self._refusals: Counter[tuple[str, str]] = Counter()  # by kind and code
        self._logins: Counter[LoginResult] = Counter()
        self.registry.register(Folding(self._sources))

    def add_source(self, source: Source) -> None:
        """Ask `source` at every scrape; samples of one name and labels are added."""
        self._sources.append(source)

    def refused(self, error: OgelError) -> None:
        """Count an error that a client is told."""
        self._refusals[error.kind, error.code] += 1

    def login(self, result: LoginResult) -> None:
        """Count a login that has ended."""
        self._logins[result] += 1

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _own(self) -> Iterator[Sample]:
        for labels, count in self._refusals.items():
            yield CounterSample(REFUSALS, labels, count)
        for result in get_args(LoginResult):
            yield CounterSample(LOGINS, (result,), self._logins[result])


class Folding(Collector):
    """Add up what the sources say and hand it to the registry."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        # The registry would collect instead, and sources aren't ready when asked.
        return ()

    def collect(self) -> Iterator[Metric]:
        values: dict[str, dict[Labels, float]] = {
            name: defaultdict(float) for name in COUNTERS | GAUGES
        }
        counts: dict[Labels, list[int]] = {}
        seconds: dict[Labels, float] = defaultdict(float)
        for source in self._sources:
            for sample in source():
                if not isinstance(sample, LatencySample):
                    values[sample.name][sample.labels] += sample.value
                    continue
                labels: Labels = (sample.tier, sample.database_type)
                known = counts.get(labels, [0] * len(sample.counts))
                counts[labels] = [
                    a + b for a, b in zip(known, sample.counts, strict=True)
                ]
                seconds[labels] += sample.seconds
                values[REQUESTS][labels] += sum(sample.counts)

        yield _histogram(counts, seconds)
        for table, kind in (
            (COUNTERS, CounterMetricFamily),
            (GAUGES, GaugeMetricFamily),
        ):
            for name, declared in table.items():
                family = kind(name, declared.text, labels=declared.labels)
                for of_sample, value in values[name].items():
                    family.add_metric(of_sample, value)
                yield family


def _histogram(
    counts: Mapping[Labels, Sequence[int]], seconds: Mapping[Labels, float]
) -> HistogramMetricFamily:
    declared = HISTOGRAMS[LATENCY]
    family = HistogramMetricFamily(LATENCY, declared.text, labels=declared.labels)
    bounds = (*map(str, LATENCY_BOUNDS), "+Inf")
    for labels, of_buckets in counts.items():
        cumulative = list(zip(bounds, accumulate(of_buckets), strict=True))
        family.add_metric(labels, cumulative, seconds[labels])
    return family
