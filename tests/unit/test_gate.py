"""The gate: maxima of an organisation and of the process."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.errors import InternalError, TooManyConnections
from ogelproxy.gate import Gate
from ogelproxy.tenants.model import Tenant, Tier

FREE = Tier("free", 2, 10.0, 1, False, 0, 5, 10, None, None, 1)


def tenant(handle: str = "org_a", **changes: object) -> Tenant:
    made = Tenant(UUID(int=1), handle, "A", FREE, False, 1, salt=b"salt")
    return replace(made, **changes)  # type: ignore[arg-type]


def test_an_organisation_is_admitted_up_to_its_tier_s_maximum() -> None:
    gate = Gate()
    gate.admit(tenant())
    gate.admit(tenant())
    with pytest.raises(TooManyConnections) as refused:
        gate.admit(tenant())
    error = refused.value
    assert (error.sqlstate, error.is_fatal) == ("53300", True)
    assert error.client_text == "connection limit exceeded"
    assert error.detail == "tier=free limit=2 count=2"
    assert "upgrade" in error.hint
    assert gate.count("org_a") == 2


def test_a_refused_connection_is_not_counted() -> None:
    gate = Gate()
    closed = tenant(connections_override=0)
    with pytest.raises(TooManyConnections):
        gate.admit(closed)
    assert (gate.count("org_a"), len(gate)) == (0, 0)


def test_an_override_beats_the_tier_s_maximum() -> None:
    gate = Gate()
    for _ in range(5):
        gate.admit(tenant(connections_override=5))
    with pytest.raises(TooManyConnections) as refused:
        gate.admit(tenant(connections_override=5))
    assert refused.value.detail == "tier=free limit=5 count=5"


def test_a_lowered_maximum_ends_nobody_and_admits_nobody() -> None:
    gate = Gate()
    gate.admit(tenant())
    gate.admit(tenant())
    with pytest.raises(TooManyConnections):
        gate.admit(tenant(connections_override=1))
    gate.leave("org_a")
    with pytest.raises(TooManyConnections):
        gate.admit(tenant(connections_override=1))
    gate.leave("org_a")
    gate.admit(tenant(connections_override=1))


def test_one_organisation_s_connections_take_no_place_of_another_s() -> None:
    gate = Gate()
    gate.admit(tenant("org_a"))
    gate.admit(tenant("org_a"))
    gate.admit(tenant("org_b"))
    assert (gate.count("org_a"), gate.count("org_b")) == (2, 1)


def test_who_leaves_more_often_than_it_came_is_a_defect() -> None:
    gate = Gate()
    with pytest.raises(InternalError, match="org_a left the gate"):
        gate.leave("org_a")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_no_entry_stays_at_zero(events: list[tuple[str, bool]]) -> None:
    gate = Gate()
    model = dict.fromkeys("abc", 0)
    for handle, comes in events:
        if comes and model[handle] < 2:
            gate.admit(tenant(handle))
            model[handle] += 1
        elif not comes and model[handle]:
            gate.leave(handle)
            model[handle] -= 1
        assert {name: gate.count(name) for name in "abc"} == model
        assert len(gate) == sum(count > 0 for count in model.values())
