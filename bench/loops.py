"""Loops: `_loops`, built where it lies and when it is out of date, and loaded.

It is no part of the package: it takes Cython and a compiler, as building that does.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).with_name("_loops.pyx")


def build() -> None:
    """Build the loops unless they are newer than all that they are made of.

    Raises CalledProcessError where that fails, with the compiler's words shown.
    """
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-3", "-q"]
    subprocess.run([*command, str(SOURCE)], check=True, stdout=sys.stderr)


def load() -> ModuleType:
    """Return the module, as `build` left it."""
    return importlib.import_module("bench._loops")
