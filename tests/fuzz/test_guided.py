"""Seconds of what `python -m tests.fuzz` does for hours."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import targets

pytestmark = [
    pytest.mark.skipif(fuzz.missing() is not None, reason=str(fuzz.missing())),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    fuzz.build()


def sanitised(script: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as the targets are run."""
    return subprocess.run(
        [sys.executable, "-B", "-P", "-c", script],
        env=fuzz.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", targets.MODULES)
def test_seconds_of_guided_fuzzing_find_nothing(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "2", name],
        cwd=fuzz.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_fuzzed_is_the_build_with_sanitizers() -> None:
    done = sanitised("import ogelproxy._client as m; print(m.__file__)")
    assert done.stdout.startswith(str(fuzz.LIBRARY)), done.stderr
    for path in fuzz.LIBRARY.glob("ogelproxy/_*.so"):
        binary = path.read_bytes()
        for symbol in (b"__asan_report_load1", b"__sanitizer_cov_8bit_counters_init"):
            assert symbol in binary, path.name
        assert b"__ubsan_handle_add_overflow_abort" in binary, path.name


def test_a_write_past_the_end_ends_the_process() -> None:
    done = sanitised(
        "import ctypes; ctypes.memset(ctypes.create_string_buffer(32), 0, 4096)"
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
