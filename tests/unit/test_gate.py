"""The gate: maxima of an organisation and of the process."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.errors import InternalError, OgelError, TooManyConnections
from ogelproxy.gate import Admission, Gate
from ogelproxy.tenants.model import Tenant, Tier

FREE = Tier("free", 2, 10.0, 1, False, 0, 5, 10, None, None, 1)


def tenant(handle: str = "org_a", **changes: object) -> Tenant:
    made = Tenant(UUID(int=1), handle, "A", FREE, False, 1, salt=b"salt")
    return replace(made, **changes)  # type: ignore[arg-type]


async def test_an_organisation_is_admitted_up_to_its_tier_s_maximum() -> None:
    gate = Gate()
    await gate.admit(tenant())
    await gate.admit(tenant())
    with pytest.raises(TooManyConnections) as refused:
        await gate.admit(tenant())
    error = refused.value
    assert (error.sqlstate, error.is_fatal) == ("53300", True)
    assert error.client_text == "connection limit exceeded"
    assert error.detail == "tier=free limit=2 count=2"
    assert "upgrade" in error.hint
    assert gate.count("org_a") == 2


async def test_a_refused_connection_is_not_counted() -> None:
    gate = Gate()
    closed = tenant(connections_override=0)
    with pytest.raises(TooManyConnections):
        await gate.admit(closed)
    assert (gate.count("org_a"), len(gate)) == (0, 0)


async def test_an_override_beats_the_tier_s_maximum() -> None:
    gate = Gate()
    for _ in range(5):
        await gate.admit(tenant(connections_override=5))
    with pytest.raises(TooManyConnections) as refused:
        await gate.admit(tenant(connections_override=5))
    assert refused.value.detail == "tier=free limit=5 count=5"


async def test_a_lowered_maximum_ends_nobody_and_admits_nobody() -> None:
    gate = Gate()
    first, second = await gate.admit(tenant()), await gate.admit(tenant())
    with pytest.raises(TooManyConnections):
        await gate.admit(tenant(connections_override=1))
    gate.leave(first)
    with pytest.raises(TooManyConnections):
        await gate.admit(tenant(connections_override=1))
    gate.leave(second)
    await gate.admit(tenant(connections_override=1))


async def test_one_organisation_s_connections_take_no_place_of_another_s() -> None:
    gate = Gate()
    await gate.admit(tenant("org_a"))
    await gate.admit(tenant("org_a"))
    await gate.admit(tenant("org_b"))
    assert (gate.count("org_a"), gate.count("org_b")) == (2, 1)


async def test_who_leaves_twice_is_a_defect() -> None:
    gate = Gate()
    admission = await gate.admit(tenant())
    gate.leave(admission)
    with pytest.raises(InternalError, match="org_a left the gate"):
        gate.leave(admission)


async def test_who_loses_its_place_hears_why_and_is_counted_out_once() -> None:
    gate = Gate()
    admission, other = await gate.admit(tenant()), await gate.admit(tenant())
    heard: list[OgelError] = []
    admission.on_lost = heard.append
    error = TooManyConnections()
    gate.lose(admission, error)
    assert (heard, gate.count("org_a")) == ([error], 1)
    gate.leave(admission)  # as its connection ends
    assert gate.count("org_a") == 1
    gate.leave(other)
    assert len(gate) == 0


class LosingSlots:
    """Slots that lose an admission in the moment in which they have granted it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def take(
        self, handle: str, holder: Admission, maximum: int, version: int
    ) -> int | None:
        self._gate.lose(holder, TooManyConnections("lost"))
        return None

    def give(self, handle: str, holder: Admission) -> None:
        raise AssertionError("what is lost is not given back")

    def total(self, handle: str) -> int:
        return 7


async def test_a_place_that_is_lost_as_soon_as_it_is_got_lets_nobody_in() -> None:
    gate = Gate()
    gate.slots = LosingSlots(gate)
    with pytest.raises(TooManyConnections, match="lost"):
        await gate.admit(tenant())
    assert (gate.count("org_a"), gate.total("org_a")) == (0, 7)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
async def test_no_entry_stays_at_zero(events: list[tuple[str, bool]]) -> None:
    gate = Gate()
    model: dict[str, list[Admission]] = {name: [] for name in "abc"}
    for handle, comes in events:
        if comes and len(model[handle]) < 2:
            model[handle].append(await gate.admit(tenant(handle)))
        elif not comes and model[handle]:
            gate.leave(model[handle].pop())
        assert {name: gate.count(name) for name in "abc"} == {
            name: len(admissions) for name, admissions in model.items()
        }
        assert len(gate) == sum(map(bool, model.values()))
