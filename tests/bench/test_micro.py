"""The micro cases: each loop does what it says, and can be timed.

`pytest tests/bench/test_micro.py --benchmark-only` shows their times by
pytest-benchmark; as a test each runs once, and no time is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from pytest_benchmark.fixture import BenchmarkFixture

from bench import bucket, exchanges, fingerprint, layers, loops, relay, wire
from bench.__main__ import main
from bench.desk import Desk
from bench.micro import OURS, Micro
from ogelproxy._bucket import TokenBucket
from ogelproxy._fingerprint import scan
from ogelproxy.usage.spool import read_pairs

CASES: tuple[Micro, ...] = (
    *(wire.CASE, bucket.CASE, layers.CASE, relay.CASE, fingerprint.CASE),
)
#: Passes through a loop that are timed as one.
PASSES = 100


@pytest.fixture(scope="module")
def compiled() -> Any:
    loops.build()
    return loops.load()


@pytest.fixture
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}, {name}")
        for case in CASES
        for name in case.names
    ],
)
def test_a_loop_can_be_timed(
    case: Micro, name: str, compiled: Any, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = case.name
    with case.opened(OURS) as opened:
        assert list(opened) == list(case.names)
        assert isinstance(opened[name], compiled.Loop)
        benchmark(opened[name], PASSES)


def test_a_scan_is_that_of_the_text(compiled: Any) -> None:
    text = exchanges.POINT_QUERY.encode()
    scans = compiled.Scans(text)
    scans(2)
    assert scans.fingerprint == scan(text).fingerprint


def test_tokens_are_taken_one_by_one(compiled: Any) -> None:
    bucket = TokenBucket(1.0, 10.0, 0.0)
    compiled.Takes(bucket, 0.0, 0.5)(30)
    # Ten of the full bucket, and those that came in 14.5 seconds behind the first.
    assert bucket.admitted == 24
    assert bucket.refused == 6


def test_leases_are_renewed_before_they_end(compiled: Any) -> None:
    with bucket.CASE.opened(OURS) as opened:
        leased: Any = opened[bucket.LEASED]
        leased(1000)
        assert leased.bucket.admitted == 1000
        assert leased.bucket.refused == 0


def test_counted_queries_are_in_usage_and_metrics(compiled: Any, desk: Desk) -> None:
    client, _ = desk.client(compiled.QuietClient)
    server, _ = desk.server(compiled.QuietServer)
    client.meet(server)
    compiled.Counts(server, 10)(100)
    rows = read_pairs(desk.usage.longest(UUID(int=1).bytes, 100))
    assert sorted(row.queries for row in rows) == [10] * 10
    assert desk.traffic.queries == 100


def test_queries_are_paid_for(compiled: Any, desk: Desk) -> None:
    client, _ = desk.client(compiled.QuietClient)
    compiled.Pays(client)(50)
    assert desk.bucket.admitted == 50


def test_a_relayed_query_passes_every_layer(compiled: Any, desk: Desk) -> None:
    client, client_end = desk.client()
    server, server_end = desk.server()
    server.enter_pool()
    exchange = exchanges.POINT["extended"]
    compiled.Queries(
        *(client, client_end.fileno(), server, server_end.fileno()),
        *(exchange.request, exchange.request, exchange.answer),
    )(7)
    assert desk.bucket.admitted == 7
    assert desk.traffic.queries == desk.traffic.transactions == 7
    (row,) = read_pairs(desk.usage.longest(UUID(int=1).bytes, 10))
    assert (row.queries, row.rows) == (7, 7)
    assert row.fingerprint == scan(exchanges.POINT_QUERY.encode()).fingerprint


def test_answers_are_cut_to_their_end(compiled: Any, desk: Desk) -> None:
    client, _ = desk.client(compiled.QuietClient)
    server, _ = desk.server(compiled.QuietServer)
    client.meet(server)
    exchange = exchanges.POINT["simple"]
    with pytest.raises(RuntimeError, match="not all of the answers"):
        compiled.Answers(server, exchange.answer[:-1], exchange.asked)(1)


def test_instructions_are_not_made_up_where_nobody_counts(compiled: Any) -> None:
    with pytest.raises(RuntimeError, match="under callgrind only"):
        compiled.Nothing().instructions(1)


def test_layers_are_shown_with_their_sum_and_their_target() -> None:
    shown = CliRunner().invoke(main, ["layers", "--quick", "--only", OURS])
    assert shown.exit_code == 0, shown.output
    for word in (*layers.CASE.names, "together", "met"):
        assert word in shown.output
