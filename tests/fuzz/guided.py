"""One fuzzer, run in a process of its own by `python -m tests.fuzz`.

    guided.py NAME FAILURES [--blind] LIBFUZZER-ARGUMENT...

FAILURES is the directory for inputs that fail.

The process has the sanitizers' runtime loaded before everything, and extensions
that report their edges to it; Python modules of the package report theirs too.
"""

from __future__ import annotations

import hashlib
import logging
import random
import shlex
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["ogelproxy.protocol", "ogelproxy.auth", "ogelproxy.relay"],
    enable_loader_override=False,
):
    from tests.fuzz import targets

    target = targets.load(sys.argv[1])


def by_chance() -> bytes:
    """Change some seed at random, whatever was found: fuzzing without guidance."""
    made = bytearray(chance.choice(target.seeds))
    for _ in range(chance.randint(1, 8)):
        start = chance.randint(0, len(made))
        end = min(len(made), start + chance.choice((0, 0, 1, 1, 4, 16)))
        new = (chance.randbytes(1), *target.words, *target.seeds, b"")
        made[start:end] = chance.choice(new)
    return bytes(made[: target.max_bytes])


def run(data: bytes) -> None:
    if is_blind:
        # libFuzzer then only counts edges: what it made isn't looked at.
        data = by_chance()
    try:
        target.run(data)
    except BaseException:
        # libFuzzer doesn't keep every input that ended by an exception.
        name = hashlib.sha1(data).hexdigest()
        Path(f"{failures}/exception-{name}").write_bytes(data)
        raise


logging.disable()  # each broken input would say that it is
chance = random.Random(0)
failures, *arguments = sys.argv[2:]
is_blind = "--blind" in arguments
# A merge is done in processes that libFuzzer starts by a shell.
itself = shlex.join([sys.executable, "-B", "-P", *sys.argv[:3]])
atheris.Setup([itself, *(each for each in arguments if each != "--blind")], run)
atheris.Fuzz()
