"""Drivers of Go: pgx in each of its ways of running a query, and lib/pq."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drivers.conftest import Database
from tests.drivers.programs import (
    TEST_TIMEOUT,
    Case,
    Program,
    cases_of,
    find_toolchain,
    install,
)

pytestmark = pytest.mark.timeout(TEST_TIMEOUT)

HERE = Path(__file__).parent / "go"
BUILD = HERE / "build"

#: Program and its argument, and the file that names its cases.
PROGRAMS = {
    ("pgx",): "pgx/others.go",
    ("pgx", "cache_statement"): "pgx/modes.go",
    ("pgx", "cache_describe"): "pgx/modes.go",
    ("pgx", "describe_exec"): "pgx/modes.go",
    ("pgx", "exec"): "pgx/modes.go",
    ("pgx", "simple_protocol"): "pgx/modes.go",
    ("pq",): "pq/others.go",
    ("pq", "text"): "pq/formats.go",
    ("pq", "binary"): "pq/formats.go",
}
CASES = [
    case
    for command, source in PROGRAMS.items()
    for case in cases_of(" ".join(command), HERE / source)
]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Each program, built; what is built already takes a second."""
    (go,) = find_toolchain("go")
    install([go, "build", "-o", f"{BUILD}/", "./pgx", "./pq"], HERE)
    return {
        " ".join(command): Program([BUILD / command[0], *command[1:]], HERE)
        for command in PROGRAMS
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_of_a_driver(
    database: Database, programs: dict[str, Program], case: Case
) -> None:
    programs[case.driver].check(database, case)


@pytest.mark.parametrize("driver", sorted({case.driver for case in CASES}))
def test_a_program_runs_the_cases_that_are_listed(
    database: Database, programs: dict[str, Program], driver: str
) -> None:
    listed = {case.name for case in CASES if case.driver == driver}
    assert set(programs[driver].report(database)) == listed


def test_the_programs_are_formatted_and_vetted() -> None:
    go, gofmt = find_toolchain("go", "gofmt")
    install([go, "vet", "./..."], HERE)
    # It lists the files that it would change, and ends with 0 all the same.
    install(["sh", "-c", f'test -z "$({gofmt} -l .)"'], HERE)
