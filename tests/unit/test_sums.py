"""Rows that several workers tell of one thing, as one row."""

from __future__ import annotations

from ogelproxy.console import columns
from ogelproxy.console.sums import LARGEST, rules_of, summed
from ogelproxy.protocol.rows import Column, Type

COLUMNS = (
    Column("name"),
    Column("servers", Type.INT4),
    Column("paused", Type.INT4),
    Column("circuit"),
    Column("tier"),
)


def test_numbers_are_added_texts_are_known_to_one_and_states_are_the_worst() -> None:
    told = [
        ["a", 1, 0, "closed", None],
        ("b", 5, 0, "open", "free"),
        ["a", 2, 1, "half-open", "pro"],
        ["a", 4, 0, "closed", "pro"],
    ]
    assert summed(told, rules_of(COLUMNS)) == [
        ["a", 7, 1, "half-open", "pro"],
        ["b", 5, 0, "open", "free"],
    ]


def test_what_was_told_is_left_as_it_was() -> None:
    told = [["a", 1, 0, "closed", None], ["a", 1, 0, "closed", None]]
    summed(told, rules_of(COLUMNS))
    assert told[0] == told[1]


def test_rows_may_be_told_apart_by_more_than_one_value() -> None:
    rules = rules_of((Column("list"), Column("item"), Column("count", Type.INT4)))
    told = [["users", "a", 0], ["users", "b", 0], ["users", "a", 0], ["pools", None, 2]]
    assert summed(told, rules, 2) == [
        ["users", "a", 0],
        ["users", "b", 0],
        ["pools", None, 2],
    ]


def test_every_number_that_is_not_added_up_is_a_column() -> None:
    added = (columns.DATABASES, columns.POOLS, columns.USERS)
    assert {each.name for table in added for each in table} >= LARGEST
