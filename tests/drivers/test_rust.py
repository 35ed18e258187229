"""Drivers of Rust: tokio-postgres with deadpool, and sqlx."""

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

HERE = Path(__file__).parent / "rust"
BUILD = HERE / "target" / "debug"
CASES = [
    *cases_of("tokio-postgres", HERE / "src" / "tokio_postgres"),
    *cases_of("sqlx", HERE / "src" / "sqlx"),
]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Each program, built; what is built already takes a second."""
    (cargo,) = find_toolchain("cargo")
    install([cargo, "build", "--quiet"], HERE)
    return {
        "tokio-postgres": Program([BUILD / "with_tokio_postgres"], HERE),
        "sqlx": Program([BUILD / "with_sqlx"], HERE),
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


def test_the_programs_are_formatted() -> None:
    cargo, _ = find_toolchain("cargo", "rustfmt")
    install([cargo, "fmt", "--check"], HERE)
