"""What idle clients take is measured, and is what was promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.case import Result


@pytest.mark.timeout(240)
def test_an_idle_client_takes_little_memory_and_no_server(
    bench: Callable[..., list[Result]],
) -> None:
    [result] = bench("idle", "ogelproxy")
    for turn in ("after a login", "after a query"):
        assert 0 < result.figures[f"of a client {turn}, bytes"] <= 10_000
        assert result.figures[f"servers {turn}"] <= 20
