"""The circuit: pauses that grow, refusals at once, one probe that decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.circuit import FIRST_PAUSE, LONGEST_PAUSE, MAX_FAILURES, Circuit
from ogelproxy.errors import CircuitOpen, TargetFull, TargetUnreachable

CAUSE = TargetUnreachable()


def longest() -> float:
    return 1.0


def opened(now: float = 100.0) -> Circuit:
    """A circuit that opened at `now`."""
    circuit = Circuit(longest)
    for _ in range(MAX_FAILURES):
        circuit.fail(CAUSE, now, now)
    assert circuit.state == "open"
    return circuit


def wait(circuit: Circuit, now: float) -> float:
    with pytest.raises(CircuitOpen) as refused:
        circuit.begin(now)
    return float(refused.value.hint.removeprefix("retry after ").removesuffix(" s"))


def test_a_target_that_never_failed_is_tried_at_once() -> None:
    circuit = Circuit()
    circuit.check(0.0)
    assert (circuit.begin(0.0), circuit.state) == (0.0, "closed")


def test_after_a_failure_the_next_attempt_waits() -> None:
    circuit = Circuit(longest)
    assert not circuit.fail(CAUSE, 10.0, 11.0)
    assert circuit.begin(11.0) == pytest.approx(FIRST_PAUSE)
    assert circuit.begin(11.0 + FIRST_PAUSE) == 0.0


def test_a_success_forgets_all_failures() -> None:
    circuit = opened()
    circuit.begin(1000.0)
    assert circuit.succeed()
    assert (circuit.begin(1000.0), circuit.state) == (0.0, "closed")
    assert not circuit.succeed()


def test_the_last_failure_that_is_forgiven_opens_the_circuit_once() -> None:
    circuit = Circuit()
    told = [circuit.fail(CAUSE, now, now) for now in range(MAX_FAILURES + 3)]
    assert told.index(True) == MAX_FAILURES - 1
    assert sum(told) == 1


def test_attempts_made_side_by_side_fail_as_one() -> None:
    circuit = Circuit(longest)
    for ended in range(20):
        circuit.fail(CAUSE, 10.0, 11.0 + ended)
    assert circuit.state == "closed"
    assert circuit.begin(11.0) == pytest.approx(FIRST_PAUSE)


def test_an_open_circuit_refuses_at_once_and_says_for_how_long() -> None:
    circuit = opened(100.0)
    pause = FIRST_PAUSE * 2 ** (MAX_FAILURES - 1)
    assert wait(circuit, 100.0) == pytest.approx(pause, abs=0.05)
    assert wait(circuit, 100.0 + pause / 2) < pause


def test_one_probe_is_made_when_the_pause_is_over() -> None:
    circuit = opened(100.0)
    assert circuit.begin(200.0) == 0.0
    assert circuit.state == "half-open"
    wait(circuit, 200.0)
    circuit.fail(CAUSE, 200.0, 201.0)
    assert circuit.state == "open"
    wait(circuit, 201.0)


def test_a_probe_that_was_given_up_leaves_room_for_the_next() -> None:
    circuit = opened(100.0)
    circuit.begin(200.0)
    circuit.forget()
    assert circuit.state == "open"
    assert circuit.begin(200.0) == 0.0


def test_the_refusal_repeats_why_the_last_attempt_failed() -> None:
    circuit = opened(100.0)
    circuit.begin(200.0)
    circuit.fail(TargetFull(), 200.0, 201.0)
    with pytest.raises(CircuitOpen) as refused:
        circuit.check(201.0)
    error = refused.value
    assert (error.sqlstate, error.client_text) == ("53300", TargetFull.client_text)
    assert (error.code, TargetUnreachable.sqlstate) == ("circuit_open", "08006")


@given(st.integers(1, 2000), st.floats(0, 1))
def test_no_pause_is_longer_than_the_longest(failures: int, jitter: float) -> None:
    circuit = Circuit(lambda: jitter)
    for number in range(failures):
        circuit.fail(CAUSE, float(number), float(number))
    end = float(failures - 1)
    circuit.check(end + LONGEST_PAUSE)
    if failures < MAX_FAILURES:
        assert circuit.begin(end) >= FIRST_PAUSE / 2
    else:
        with pytest.raises(CircuitOpen):
            circuit.check(end + FIRST_PAUSE / 4)
