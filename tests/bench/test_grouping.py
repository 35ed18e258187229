"""Pairs that two ways of grouping differ on, against listing them all."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from bench.grouping import compare, explain

KEYS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30)


@given(KEYS)
def test_pairs_are_counted_as_if_they_were_listed(keys: list[tuple[int, int]]) -> None:
    together = [(a[0] == b[0], a[1] == b[1]) for a, b in combinations(keys, 2)]
    found = compare(keys)
    assert found.statements == len(keys)
    assert found.one_groups == len({one for one, _ in keys})
    assert found.other_groups == len({other for _, other in keys})
    assert found.both_pairs == together.count((True, True))
    assert found.one_pairs == together.count((True, False))
    assert found.other_pairs == together.count((False, True))


@given(KEYS)
def test_reasons_and_what_is_left_are_all_pairs_that_differ(
    keys: list[tuple[int, int]],
) -> None:
    statements = [f"{at}" for at in range(len(keys))]
    coarse, fine = [key[0] for key in keys], [key[1] for key in keys]
    rewritings = [
        ("thirds", lambda statement: int(statement) % 3),
        ("all", lambda statement: None),
    ]
    reasons, left = explain(statements, coarse, fine, rewritings)
    assert sum(reason.pairs for reason in reasons) == compare(keys).one_pairs
    assert left.pairs == 0
    reasons, left = explain(statements, coarse, fine, rewritings[:1])
    assert reasons[0].pairs + left.pairs == compare(keys).one_pairs


def test_each_pair_is_counted_for_the_first_rewriting_that_joins_it() -> None:
    statements = ["a", "A", "b", "B", "ab"]
    reasons, left = explain(
        statements,
        coarse=[0, 0, 0, 1, 0],
        fine=list(range(5)),
        rewritings=[
            ("case", str.lower),
            ("which letter", lambda statement: len(statement)),
        ],
    )
    # `A` comes to `b` by way of `a`; `B` is in another group.
    assert [(each.name, each.pairs, each.example) for each in reasons] == [
        ("case", 1, ("a", "A")),
        ("which letter", 2, ("a", "b")),
    ]
    assert (left.name, left.pairs, left.example) == ("other", 3, ("a", "ab"))


def test_parts_that_a_third_one_has_forms_of_are_joined_by_it() -> None:
    forms = {"x": 1, "y": 2, "z1": 1, "z2": 2}
    reasons, left = explain(
        ["x", "y", "z1", "z2"], [0] * 4, [0, 1, 2, 2], [("form", forms.__getitem__)]
    )
    assert (reasons[0].pairs, left.pairs) == (5, 0)
