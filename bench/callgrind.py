"""Callgrind: what its file says of where instructions were spent.

The format is in the manual of valgrind, "Callgrind Format Specification". Names are
expected in full (``--compress-strings=no``).
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

#: What a part of a file begins with: why it was written.
TRIGGER = "desc: Trigger: "
ASKED = TRIGGER + "Client Request: "
#: What is no line of costs: they begin with a position, absolute or relative.
POSITION = "0123456789+-*"


def parts(text: str) -> list[tuple[str, Counter[str]]]:
    """Return each part that was asked for: its name, and instructions by module.

    A module is the stem of the object file that holds the code, up to its first dot.
    """
    found: list[tuple[str, Counter[str]]] = []
    costs: Counter[str] = Counter()
    module = ""
    is_call = False
    for line in text.splitlines():
        if line.startswith(TRIGGER):
            costs = Counter()
            if line.startswith(ASKED):
                found.append((line.removeprefix(ASKED), costs))
        elif line.startswith("ob="):
            module = PurePath(line.removeprefix("ob=")).name.partition(".")[0]
        elif line.startswith("calls="):
            # The next line is what was spent in there, which has lines of its own.
            is_call = True
        elif line and line[0] in POSITION:
            if not is_call:
                costs[module] += int(line.split()[1])
            is_call = False
    return found
