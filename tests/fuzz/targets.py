"""What is fuzzed: a Target per parser, its seeds, and what it must never do.

A target takes any bytes and returns; whatever it raises is a defect. Its seeds
are what a fuzzer starts from, its corpus (`corpus/NAME.txt`) what fuzzers found:
inputs that reach other code than those before them, and inputs that once failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

#: The module that holds each target; imported when it is asked for, so that only
#: what a target needs is measured and instrumented.
MODULES = {
    "sql": "sql",
    "forwarding": "opening",
    "hello": "opening",
    "startup": "startup",
    "scram-server": "scram",
    "scram-client": "scram",
    "client": "client",
    "server": "server",
}


@dataclass(frozen=True, slots=True)
class Target:
    """One entry point: `run` takes any input, of `max_bytes` at most."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]  # what a mutation may put in
    max_bytes: int = 512

    @property
    def inputs(self) -> list[bytes]:
        """The seeds and the corpus."""
        return [*self.seeds, *read_corpus(self.name)]


def load(name: str) -> Target:
    """Import the target of this name."""
    module = import_module(f"tests.fuzz.{MODULES[name]}")
    found: dict[str, Target] = {each.name: each for each in module.TARGETS}
    return found[name]


def read_corpus(name: str) -> list[bytes]:
    """Read the inputs of `corpus/NAME.txt`: one a line, as in a bytes literal."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text("ascii").splitlines() if path.exists() else []
    return [line.encode().decode("unicode_escape").encode("latin-1") for line in lines]


def write_corpus(name: str, inputs: list[bytes]) -> None:
    """Replace `corpus/NAME.txt`, the shortest inputs first."""
    lines = [
        data.decode("latin-1").encode("unicode_escape").decode()
        for data in sorted(inputs, key=lambda data: (len(data), data))
    ]
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
