"""What is not there yet takes longer, and how much so is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.case import Result


@pytest.mark.timeout(240)
def test_a_tenant_that_nobody_knows_waits_longer_than_one_in_memory(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("coldstart", "a new tenant")
    cold = result.figures["known to nobody, no server, P50, ms"]
    warm = result.figures["in memory, a server is there, P50, ms"]
    assert 0 < warm < cold


@pytest.mark.timeout(240)
def test_a_start_takes_longer_than_a_python_does(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("coldstart", "the proxy starts")
    assert result.figures["from `ogelproxy serve` to the first answer, ms"] > 10
