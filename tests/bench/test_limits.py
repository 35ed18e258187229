"""The short form of `python -m bench limits`: never over, and mistakes are seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import controls, limits
from bench.case import Result

#: All of the short form but what needs a machine to itself: how much is usable.
TRIALS = [name for name in limits.trials(is_quick=True) if not name.startswith("flat")]


@pytest.mark.timeout(400)
def test_no_limit_is_exceeded_through_faults_and_mistakes_are_seen(
    bench: Callable[..., list[Result]],
) -> None:
    results = bench("limits", *TRIALS)
    assert [result.implementation for result in results] == TRIALS
    for result in results:
        excess = result.figures["worst excess, tokens"]
        assert (excess >= 1) == result.implementation.startswith("control"), result


def test_every_control_is_part_of_the_short_form() -> None:
    tried = {trial.control for trial in limits.trials(is_quick=True).values()}
    assert tried - {None} == set(controls.CONTROLS)
