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


def run(data: bytes) -> None:
    try:
        target.run(data)
    except BaseException:
        # libFuzzer doesn't keep every input that ended by an exception.
        name = hashlib.sha1(data).hexdigest()
        Path(f"{failures}/exception-{name}").write_bytes(data)
        raise


def from_a_seed(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Mutate some seed whatever was found: what fuzzing is without guidance."""
    chosen = random.Random(seed).choice(target.seeds)
    return bytes(atheris.Mutate(chosen[:max_bytes], max_bytes))


logging.disable()  # each broken input would say that it is
failures, *arguments = sys.argv[2:]
is_blind = "--blind" in arguments
mutator = {"custom_mutator": from_a_seed} if is_blind else {}
# A merge is done in processes that libFuzzer starts by a shell.
itself = shlex.join([sys.executable, "-B", "-P", *sys.argv[:3]])
atheris.Setup(
    [itself, *(each for each in arguments if each != "--blind")], run, **mutator
)
atheris.Fuzz()
