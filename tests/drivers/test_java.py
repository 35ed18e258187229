"""Drivers of Java: pgjdbc, and HikariCP over it."""

from __future__ import annotations

import hashlib
import shutil
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

HERE = Path(__file__).parent / "java"
SOURCES = HERE / "src" / "drivers"
CASES = cases_of("pgjdbc", SOURCES)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program, compiled against the packages it needs."""
    java, javac, mvn = find_toolchain("java", "javac", "mvn")
    # Named by what is wanted: another pom's packages are never on the class path.
    wanted = hashlib.sha256((HERE / "pom.xml").read_bytes()).hexdigest()[:16]
    packages = HERE / "build" / wanted
    if not packages.exists():
        shutil.rmtree(HERE / "build", ignore_errors=True)
        fetched = HERE / "build" / "part"
        copy = "dependency:copy-dependencies"
        install([mvn, "-q", "-B", copy, f"-DoutputDirectory={fetched}"], HERE)
        fetched.rename(packages)
    classes = tmp_path_factory.mktemp("classes")
    path = f"{classes}:{packages}/*"
    install(
        [
            javac, "-encoding", "UTF-8", "-Xlint:all", "-Werror",
            "-cp", path, "-d", classes, *sorted(SOURCES.glob("*.java")),
        ],
        HERE,
    )  # fmt: skip
    return Program([java, "-cp", path, "drivers.Main"], HERE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_of_a_driver(database: Database, program: Program, case: Case) -> None:
    program.check(database, case)


def test_the_program_runs_the_cases_that_are_listed(
    database: Database, program: Program
) -> None:
    assert set(program.report(database)) == {case.name for case in CASES}
