"""What operators ordered, and what is refused."""

from __future__ import annotations

from uuid import UUID

import orjson
import pytest

from ogelproxy.orders import Orders

ONE, OTHER = UUID(int=1), UUID(int=2)


def test_an_order_is_for_one_target_or_for_all() -> None:
    orders = Orders()
    assert orders.change("PAUSE", ONE) == ""
    assert (orders.pauses(ONE), orders.pauses(OTHER)) == (True, False)
    assert orders.change("PAUSE", None) == ""
    assert orders.pauses(OTHER)
    assert orders.change("RESUME", None) == ""
    assert not orders.pauses(ONE)


@pytest.mark.parametrize(
    ("verb", "target", "reason"),
    [
        ("PAUSE", ONE, "paused already"),
        ("RESUME", OTHER, "not paused"),
    ],
)
def test_what_is_so_already_is_refused_and_changes_nothing(
    verb: str, target: UUID, reason: str
) -> None:
    orders = Orders()
    assert orders.change("RESUME", None) == "nothing is paused"
    orders.change("PAUSE", ONE)
    before = orders.dump()
    assert reason in orders.change(verb, target)
    assert orders.dump() == before


def test_one_target_is_not_resumed_while_all_are_paused() -> None:
    orders = Orders()
    orders.change("PAUSE", ONE)
    orders.change("PAUSE", None)
    assert "RESUME alone" in orders.change("RESUME", ONE)
    assert "paused already" in orders.change("PAUSE", OTHER)


def test_a_kill_and_a_disable_may_be_repeated() -> None:
    orders = Orders()
    for _ in range(2):
        assert orders.change("KILL", ONE) == orders.change("DISABLE", OTHER) == ""
    assert orders.pauses(ONE)
    assert orders.disabled == {OTHER}
    orders.change("ENABLE", OTHER)
    assert not orders.disabled


def test_orders_are_the_same_on_the_other_side_of_a_line() -> None:
    orders = Orders()
    orders.change("PAUSE", ONE)
    orders.change("DISABLE", OTHER)
    assert Orders.load(orjson.loads(orjson.dumps(orders.dump()))) == orders
    assert orders.version == 2
