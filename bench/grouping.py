"""Grouping: two ways to group statements, and the pairs on which they differ.

A pair of statements is together in a way if both have the same key. Pairs are
counted by the sizes of groups, exactly, and never listed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two ways, one and other, group the same statements."""

    statements: int
    one_groups: int
    other_groups: int
    #: Pairs that are together in both, and in one of the two.
    both_pairs: int
    one_pairs: int
    other_pairs: int


@dataclass(frozen=True, slots=True)
class Reason:
    """A rewriting after which the finer way no longer tells some pairs apart."""

    name: str
    pairs: int
    #: Two statements of such a pair, short ones; none if there are no pairs.
    example: tuple[str, str] | None


def compare(keys: Iterable[tuple[Hashable, Hashable]]) -> Agreement:
    """Compare by the keys that each statement has in one way and the other."""
    cells = Counter(keys)
    one: Counter[Hashable] = Counter()
    other: Counter[Hashable] = Counter()
    for (its_one, its_other), count in cells.items():
        one[its_one] += count
        other[its_other] += count
    both = pairs(cells.values())
    return Agreement(
        statements=cells.total(),
        one_groups=len(one),
        other_groups=len(other),
        both_pairs=both,
        one_pairs=pairs(one.values()) - both,
        other_pairs=pairs(other.values()) - both,
    )


def pairs(sizes: Iterable[int]) -> int:
    """Return how many pairs there are within groups of these sizes."""
    return sum(size * (size - 1) // 2 for size in sizes)


def explain(
    statements: Sequence[str],
    coarse: Sequence[Hashable],
    fine: Sequence[Hashable],
    rewritings: Sequence[tuple[str, Callable[[str], Hashable]]],
) -> tuple[list[Reason], Reason]:
    """Say why statements with one key in `coarse` have several in `fine`.

    Rewritings are applied one after the other: what one has joined stays joined,
    so each pair is counted once, for the first that joins it. Returned are the
    reasons in that order, and the pairs that are left.
    """
    joined = {name: 0 for name, _ in rewritings}
    examples: dict[str, tuple[str, str]] = {}
    left = 0
    left_example: tuple[str, str] | None = None
    members = defaultdict(list)
    for at, key in enumerate(coarse):
        members[key].append(at)
    for group in members.values():
        parts: dict[Hashable, list[int]] = defaultdict(list)
        for at in group:
            parts[fine[at]].append(at)
        apart = list(parts.values())
        for name, rewrite in rewritings:
            if len(apart) == 1:
                break
            before = pairs(map(len, apart))
            forms = [{rewrite(statements[at]) for at in part} for part in apart]
            apart, example = _join(apart, forms)
            joined[name] += pairs(map(len, apart)) - before
            if example:
                found = statements[example[0]], statements[example[1]]
                examples[name] = min(examples.get(name, found), found, key=_length)
        left += pairs([len(group)]) - pairs(map(len, apart))
        if len(apart) > 1:
            found = statements[apart[0][0]], statements[apart[1][0]]
            left_example = min(left_example or found, found, key=_length)
    reasons = [
        Reason(name, count, examples.get(name)) for name, count in joined.items()
    ]
    return reasons, Reason("other", left, left_example)


def _join(
    parts: Sequence[list[int]], forms: Sequence[set[Hashable]]
) -> tuple[list[list[int]], tuple[int, int] | None]:
    """Join the parts that have a form in common, also by way of others."""
    joined: list[tuple[list[int], set[Hashable]]] = []
    example = None
    for part, its_forms in zip(parts, forms, strict=True):
        touched = [each for each in joined if not its_forms.isdisjoint(each[1])]
        if touched:
            example = example or (touched[0][0][0], part[0])
        joined = [each for each in joined if its_forms.isdisjoint(each[1])]
        joined.append(
            (
                [at for members, _ in touched for at in members] + part,
                its_forms.union(*(each[1] for each in touched)),
            )
        )
    return [members for members, _ in joined], example


def _length(example: tuple[str, str]) -> int:
    return len(example[0]) + len(example[1])
