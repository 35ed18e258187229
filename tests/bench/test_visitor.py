"""A visitor logs in, asks, and is told what it did wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.visitor import Door, Refused, Visitor
from tests.fixtures.postgres import Postgres


@pytest.fixture
def door(postgres: Postgres) -> Door:
    return Door.of(postgres.dsn())


def test_a_visitor_gets_the_rows_of_each_query_and_derives_its_key_once(
    door: Door,
) -> None:
    for _ in range(2):
        visitor = Visitor(door).enter()
        assert visitor.ask("SELECT 1, NULL UNION ALL SELECT 2, 'b'") == [
            [b"1", None],
            [b"2", b"b"],
        ]
        assert visitor.ask("SELECT repeat('x', 200000)") == [[b"x" * 200_000]]
        visitor.leave()
        visitor.leave()
    assert len(door.keys) == 1


def test_an_error_is_raised_with_its_state(door: Door) -> None:
    visitor = Visitor(door).enter()
    with pytest.raises(Refused, match="42P01"):
        visitor.ask("SELECT 1 FROM nowhere")
    visitor.leave()


def test_a_wrong_password_is_refused(door: Door) -> None:
    visitor = Visitor(replace(door, password="another", keys={}))
    with pytest.raises(Refused, match="28P01"):
        visitor.enter()
    visitor.leave()
