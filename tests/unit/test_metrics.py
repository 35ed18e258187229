"""Metrics: what is declared, what is added up, what Prometheus reads."""

from __future__ import annotations

import functools
import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ogelproxy.errors import CredentialRejected, RateLimited
from ogelproxy.metrics import (
    COUNTERS,
    GAUGES,
    LATENCY_BOUNDS,
    CounterSample,
    GaugeSample,
    LatencySample,
    Metrics,
    Totals,
)

BUCKETS = len(LATENCY_BOUNDS) + 1


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read the text as Prometheus does: (name, sorted labels) → value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_names_follow_the_house() -> None:
    assert all(re.fullmatch(r"o7s_[a-z_]+_total", name) for name in COUNTERS)
    assert all(re.fullmatch(r"o7s_[a-z_]+(?<!_total)", name) for name in GAUGES)


def test_every_declared_metric_is_on_the_page_before_anything_happened() -> None:
    page = Metrics().render().decode()
    for name in (*COUNTERS, *GAUGES, "o7s_latency_seconds"):
        assert f"# HELP {name} " in page
    assert 'o7s_logins_total{result="accepted"} 0.0' in page


def test_refusals_and_logins_are_counted_where_they_happen() -> None:
    metrics = Metrics()
    metrics.refused(CredentialRejected())
    metrics.refused(CredentialRejected())
    metrics.refused(RateLimited())
    metrics.login("accepted")
    found = values(metrics)
    refusals = "o7s_refusals_total"
    auth = (("code", "credential_rejected"), ("kind", "auth"))
    assert found[refusals, auth] == 2
    assert found[refusals, (("code", "rate_limited"), ("kind", "limit"))] == 1
    assert found["o7s_logins_total", (("result", "accepted"),)] == 1


def test_samples_of_one_name_and_labels_are_added_over_sources() -> None:
    metrics = Metrics()
    metrics.add_source(lambda: [GaugeSample("o7s_clients", {}, 3)])
    metrics.add_source(
        lambda: [
            GaugeSample("o7s_clients", {}, 4),
            CounterSample("o7s_bytes_total", {"direction": "to_client"}, 10),
        ]
    )
    found = values(metrics)
    assert found["o7s_clients", ()] == 7
    assert found["o7s_bytes_total", (("direction", "to_client"),)] == 10


def test_a_source_is_asked_at_every_scrape_and_not_before() -> None:
    metrics = Metrics()
    asked: list[int] = []

    def source() -> list[GaugeSample]:
        asked.append(1)
        return [GaugeSample("o7s_clients", {}, len(asked))]

    metrics.add_source(source)
    assert not asked
    assert values(metrics)["o7s_clients", ()] == 1
    assert values(metrics)["o7s_clients", ()] == 2


counts = st.lists(st.integers(0, 1000), min_size=BUCKETS, max_size=BUCKETS)


@given(first=counts, second=counts)
def test_latencies_of_several_sources_make_one_cumulative_histogram(
    first: list[int], second: list[int]
) -> None:
    metrics = Metrics()
    for of_source in (first, second):
        sample = LatencySample("free", "postgres", of_source, 1.5)
        metrics.add_source(lambda sample=sample: [sample])
    found = values(metrics)
    labels = {"tier": "free", "database_type": "postgres"}
    total = 0
    bounds = (*map(str, LATENCY_BOUNDS), "+Inf")
    for bound, a, b in zip(bounds, first, second, strict=True):
        total += a + b
        key = tuple(sorted((labels | {"le": bound}).items()))
        assert found["o7s_latency_seconds_bucket", key] == total
    plain = tuple(sorted(labels.items()))
    assert found["o7s_latency_seconds_count", plain] == total
    assert found["o7s_latency_seconds_sum", plain] == 3.0


def test_what_is_not_declared_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="not declared"):
        CounterSample("o7s_clients", {}, 1)
    with pytest.raises(ValueError, match="not declared"):
        GaugeSample("o7s_servers", {}, 1)
    with pytest.raises(ValueError, match="not declared"):
        GaugeSample("o7s_clients", {"tenant": "org_a"}, 1)
    with pytest.raises(ValueError, match="19 buckets"):
        LatencySample("free", "postgres", [0] * 18, 0.0)


def test_two_engines_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.login("accepted")
    assert values(other)["o7s_logins_total", (("result", "accepted"),)] == 0


def test_bounds_start_at_50_microseconds_and_grow() -> None:
    assert LATENCY_BOUNDS[0] == 50e-6
    assert LATENCY_BOUNDS[-1] == 10.0
    assert list(LATENCY_BOUNDS) == sorted(set(LATENCY_BOUNDS))


def test_totals_of_processes_come_together_each_by_its_rule() -> None:
    processes = [Metrics(), Metrics()]
    for number, metrics in enumerate(processes, 1):
        metrics.add_source(functools.partial(said, number))
        metrics.login("accepted")
    together = Totals()
    for metrics in processes:
        together.merge(orjson.loads(orjson.dumps(metrics.totals().pack())))
    text = together.render().decode()
    labels = 'database_type="postgres",tier="free"'
    for line in (
        "o7s_clients 3.0",
        "o7s_control_up 0.0",
        'o7s_circuit_open{database_type="neon"} 2.0',
        'o7s_logins_total{result="accepted"} 2.0',
        f"o7s_latency_seconds_sum{{{labels}}} 1.5",
        f"o7s_latency_seconds_count{{{labels}}} {BUCKETS * 3}.0",
    ):
        assert f"\n{line}\n" in text


def said(number: int) -> list[GaugeSample | LatencySample]:
    return [
        GaugeSample("o7s_clients", {}, number),
        GaugeSample("o7s_control_up", {}, number - 1),
        GaugeSample("o7s_circuit_open", {"database_type": "neon"}, number),
        LatencySample("free", "postgres", [number] * BUCKETS, number / 2),
    ]


def test_of_a_process_that_is_gone_the_counters_stay_and_the_gauges_go() -> None:
    metrics = Metrics()
    metrics.login("rejected")
    metrics.add_source(lambda: [GaugeSample("o7s_clients", {}, 7)])
    left = Totals()
    left.merge(metrics.totals().pack(), with_gauges=False)
    text = left.render().decode()
    assert 'o7s_logins_total{result="rejected"} 1.0' in text
    assert "\no7s_clients " not in text


def test_metrics_of_another_version_are_left_out() -> None:
    packed = Metrics().totals().pack()
    packed["sums"]["o7s_of_tomorrow_total"] = [[[], 1.0]]
    packed["sums"]["o7s_clients"] = [[["tomorrow"], 1.0]]
    packed["latencies"] = [[["tomorrow", "postgres"], [1, 2, 3], 1.0]]
    together = Totals()
    together.merge(packed)
    assert b"tomorrow" not in together.render()
