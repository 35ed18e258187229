"""Sums: rows that several workers tell of one thing, as one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any

from ogelproxy.protocol.rows import Column, Type

Row = Sequence[Any]
#: Makes one value of two.
Rule = Callable[[Any, Any], Any]

#: Numbers of which the largest counts; all others are added up. Limits of a whole
#: organisation are the same in all workers.
LARGEST = frozenset(
    "port server_lifetime max_client_connections max_user_client_connections "
    "paused disabled maxwait_us".split()
)
#: States of a circuit, from the best to the worst.
CIRCUITS = ("closed", "half-open", "open")


def first(one: Any, other: Any) -> Any:
    """For what is the same in all: the first that knows it."""
    return other if one is None else one


def worst(one: str, other: str) -> str:
    return max(one, other, key=CIRCUITS.index)


def rules_of(columns: Iterable[Column]) -> tuple[Rule, ...]:
    """Return how the values of each column become one."""
    return tuple(map(_rule_of, columns))


def _rule_of(column: Column) -> Rule:
    if column.name in LARGEST:
        return max
    if column.name == "circuit":
        return worst
    return first if column.type is Type.TEXT else add


def summed(rows: Iterable[Row], rules: Sequence[Rule], key: int = 1) -> list[Row]:
    """Make one row of those whose first `key` values are equal."""
    sums: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        known = sums.get(tuple(row[:key]))
        if known is None:
            sums[tuple(row[:key])] = list(row)
            continue
        for index in range(key, len(known)):
            known[index] = rules[index](known[index], row[index])
    return list(sums.values())
