"""Compare the stubs of the compiled modules with what was compiled.

    python -m tests.stubs

Ends with stubtest's exit code: 0 when each `.pyi` says what its module has.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench import loops

ROOT = Path(__file__).parent.parent

#: What Cython adds to each module, what one imports for itself, and protocols.
UNSEEN = r"""
(ogelproxy|bench)\._\w+(\.\w+)?\.__(reduce_cython|setstate_cython|pyx_capi|test)__
ogelproxy\._traffic\.LATENCY_BOUNDS
ogelproxy\._bucket\.(Keeper|Waiter)
"""


def modules() -> list[str]:
    """The names of the compiled modules."""
    return [
        f"{path.parent.name}.{path.stem}"
        for package in ("ogelproxy", "bench")
        for path in sorted(ROOT.glob(f"{package}/_*.pyx"))
    ]


def main() -> int:
    loops.build()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as unseen:
        unseen.write(UNSEEN)
        unseen.flush()
        command = [
            *(sys.executable, "-m", "mypy.stubtest", "--concise"),
            *("--mypy-config-file", "pyproject.toml", "--allowlist", unseen.name),
            # Every extension class has a layout of its own; nobody mixes them.
            "--ignore-disjoint-bases",
            *modules(),
        ]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
