"""Drivers of Node: node-postgres, postgres.js, and Drizzle over both."""

from __future__ import annotations

import hashlib
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

HERE = Path(__file__).parent / "node"
CASES = [
    *cases_of("pg", HERE / "pg"),
    *cases_of("postgres.js", HERE / "postgresjs"),
    *cases_of("drizzle over pg", HERE / "drizzle"),
    *cases_of("drizzle over postgres.js", HERE / "drizzle"),
]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Each driver's program, with the packages it needs installed."""
    node, npm = find_toolchain("node", "npm")
    # npm leaves its own copy of the lock file where it ended well.
    wanted = (HERE / "package-lock.json").read_bytes()
    stamp = HERE / "node_modules" / ".installed"
    digest = hashlib.sha256(wanted).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        install([npm, "ci"], HERE)
        stamp.write_text(digest)
    return {
        "pg": Program([node, "pg/main.mjs"], HERE),
        "postgres.js": Program([node, "postgresjs/main.mjs"], HERE),
        "drizzle over pg": Program([node, "drizzle/main.mjs", "pg"], HERE),
        "drizzle over postgres.js": Program(
            [node, "drizzle/main.mjs", "postgres"], HERE
        ),
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
