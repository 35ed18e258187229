"""Fuzz, guided by coverage and under the address and undefined sanitizers.

    python -m tests.fuzz [--seconds N] [--blind] [--keep] [target ...]

Builds the extensions a second time, into `build/fuzz`, with clang, and runs each
target for N seconds. What is found is kept there from run to run; inputs that
fail lie in `build/fuzz/NAME/failures`. Ends with 1 when there were any, with 2
when clang or Atheris are not there.

--blind changes seeds at random and learns nothing, to compare edges with.
--keep writes what was found, minimised, to `tests/fuzz/corpus`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz import targets
from tests.fuzz.targets import Target

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
LIBRARY = BUILD / "lib"

#: Newest first. Any will do: the runtime is Atheris's own.
COMPILERS = ("clang", *(f"clang-{version}" for version in range(21, 12, -1)))
STATUS = re.compile(
    r"#(?P<runs>\d+)\s+(?P<event>\w+)\s+cov: (?P<edges>\d+) ft: (?P<features>\d+)"
    r"(?: corp: (?P<inputs>\d+)/\S+)?"
)
DEEP = re.compile(r"\s+#(1[5-9]|[2-9]\d|\d{3,}) ")


def missing() -> str | None:
    """Say what is lacking for guided fuzzing; None when nothing is."""
    if compiler() is None:
        return "clang is missing (apt-get install clang)"
    if find_spec("atheris") is None:
        return "Atheris is missing: it has wheels for Python 3.11 to 3.13 on Linux"
    return None


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def build() -> None:
    """Build the package into `build/fuzz/lib`, only what has changed."""
    environment = os.environ | {
        "CC": str(compiler()),
        "CFLAGS": "-fsanitize=fuzzer-no-link -fno-sanitize-recover=undefined",
        "OGELPROXY_SANITIZE": "1",
    }
    command = [sys.executable, "setup.py", "-q", "build"]
    command += ["--build-base", str(BUILD), "--build-lib", str(LIBRARY)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the sanitised build failed:\n{done.stdout}{done.stderr}")


def environment() -> dict[str, str]:
    """The environment of a process that runs the sanitised extensions."""
    atheris = find_spec("atheris")
    assert atheris is not None and atheris.origin is not None
    runtime = Path(atheris.origin).parent.parent / "asan_with_fuzzer.so"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(LIBRARY), str(ROOT)]),
        "LD_PRELOAD": str(runtime),
        # Each object by itself, so that reading past one is noticed.
        "PYTHONMALLOC": "malloc",
        # Python leaves much behind on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def write_inputs(directory: Path, inputs: Iterable[bytes]) -> None:
    """Make `directory` hold exactly these inputs, named by their hashes."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for data in inputs:
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


class Campaign:
    """The fuzzing of one target, from its seeds to what it found."""

    def __init__(self, target: Target, *, is_blind: bool) -> None:
        self.target = target
        self.is_blind = is_blind
        self.place = BUILD / target.name
        self.failures = self.place / "failures"
        self.found = self.place / ("blind" if is_blind else "corpus")
        self.seeds = self.place / "seeds"
        self.first: dict[str, str] = {}  # status after the seeds
        self.last: dict[str, str] = {}
        self.began = self.ended = 0.0  # when the seeds were done, and all

    def command(self, *arguments: str) -> list[str]:
        script = str(Path(__file__).with_name("guided.py"))
        return [
            *(sys.executable, "-B", "-P", script, self.target.name, str(self.failures)),
            *(["--blind"] if self.is_blind else []),
            f"-max_len={self.target.max_bytes}",
            *arguments,
        ]

    def run(self, seconds: int) -> bool:
        """Fuzz, showing progress; return whether nothing failed."""
        if self.is_blind:
            shutil.rmtree(self.found, ignore_errors=True)
        for directory in (self.failures, self.found):
            directory.mkdir(parents=True, exist_ok=True)
        inputs = self.target.seeds if self.is_blind else self.target.inputs
        write_inputs(self.seeds, inputs)
        words = self.place / "words"
        words.write_text(
            "".join(
                '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'
                for word in self.target.words
            )
        )
        known = set(self.failures.iterdir())
        process = subprocess.Popen(
            self.command(
                *(f"-dict={words}", f"-artifact_prefix={self.failures}/"),
                *(f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4096"),
                "-detect_leaks=0",  # it would run an input twice to look for one
                *(str(self.found), str(self.seeds)),
            ),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        output = [line for line in process.stdout if not self._note(line)]
        if process.wait() == 0:
            return True
        # The interpreter's own frames say nothing.
        print("".join(line for line in output if not DEEP.match(line))[-8000:])
        for path in sorted(set(self.failures.iterdir()) - known):
            print(f"{self.target.name}: failed on {path}: {path.read_bytes()!r}")
        return False

    def _note(self, line: str) -> bool:
        """Keep a status line, and show the rarer ones."""
        status = STATUS.match(line)
        if status is None:
            return False
        self.last = status.groupdict("0")
        self.ended = time.monotonic()
        if status["event"] == "INITED":
            self.first = self.last
            self.began = self.ended
        if status["event"] in ("INITED", "pulse", "DONE"):
            print(f"{self.target.name:13}{line.strip()}", flush=True)
        return True

    def keep(self) -> None:
        """Write the inputs that no others make needless to the corpus."""
        merged = self.place / "merged"
        write_inputs(merged, [])
        subprocess.run(
            self.command("-merge=1", str(merged), str(self.found), str(self.seeds)),
            cwd=ROOT,
            env=environment(),
            check=True,
        )
        kept = {path.read_bytes() for path in merged.iterdir()}
        targets.write_corpus(self.target.name, sorted(kept - set(self.target.seeds)))

    def __str__(self) -> str:
        runs = int(self.last.get("runs", 0))
        rate = runs / max(self.ended - self.began, 1.0)
        first, last = (each.get("edges", "?") for each in (self.first, self.last))
        inputs = self.last.get("inputs", "?")
        name = self.target.name
        return f"{name:13}{runs:9}{rate:9.0f}{first:>7}{last:>8}{inputs:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    unknown = set(options.targets) - set(targets.MODULES)
    if unknown:
        parser.error(f"no target {sorted(unknown)}; there are {[*targets.MODULES]}")
    if (lack := missing()) is not None:
        print(lack, file=sys.stderr)
        return 2
    build()
    ok = True
    rows = []
    for name in options.targets or targets.MODULES:
        campaign = Campaign(targets.load(name), is_blind=options.blind)
        ok = campaign.run(options.seconds) and ok
        if options.keep:
            campaign.keep()
        rows.append(str(campaign))
    print(f"{'target':13}     runs   runs/s  edges  at end  inputs")
    print("\n".join(rows))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
