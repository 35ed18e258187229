"""Programs of other languages, each of which runs one driver's cases.

A program reads two URLs from its environment, runs every case once, in order, and
prints a JSON object per case: `case`, `ok`, `error`, and `value`, what the case
read, as text that is the same wherever Postgres says the same. It finds the schema
`matrix` made anew. Here it is run once for each way to the database, and each case
is a test: it must succeed, and must have read what it reads without the proxy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.drivers.conftest import Database

#: How long all cases of one program may take, in seconds; each has its own, shorter,
#: limit within the program.
PROGRAM_TIMEOUT = 150

#: How long one test may take that installs a toolchain's packages and runs a program
#: twice, in seconds.
TEST_TIMEOUT = 600

_SCHEMA = """
DROP SCHEMA IF EXISTS matrix CASCADE;
CREATE SCHEMA matrix;
CREATE TYPE matrix.mood AS ENUM ('sad', 'happy');
CREATE TYPE matrix.pair AS (number int, word text);
CREATE DOMAIN matrix.even AS int CHECK (value % 2 = 0);
CREATE TABLE matrix.item (
    id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    price numeric(10, 2) CONSTRAINT price_is_not_negative CHECK (price >= 0),
    mood matrix.mood
);
CREATE TABLE matrix.part (
    id serial PRIMARY KEY,
    item_id int NOT NULL REFERENCES matrix.item DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE matrix.account (id int PRIMARY KEY, balance int NOT NULL);
INSERT INTO matrix.account SELECT n, 100 FROM generate_series(1, 10) n;
CREATE TABLE matrix.wide (id int, body text, bytes bytea);
"""


@dataclass(frozen=True)
class Case:
    """One case of one program."""

    driver: str
    name: str

    def __str__(self) -> str:
        return f"{self.driver}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """How a case went: what it read, or why it failed."""

    value: str
    error: str


class Program:
    """One driver's program; what it reported is kept for each way."""

    def __init__(self, command: list[str | Path], directory: Path) -> None:
        self._command = command
        self._directory = directory
        self._reports: dict[str, dict[str, Outcome]] = {}

    def report(self, database: Database) -> Mapping[str, Outcome]:
        """Return the outcome of each case, and run the program if it has not run.

        Raise AssertionError if the program did not run to its end.
        """
        known = self._reports.get(database.way)
        if known is None:
            known = self._reports[database.way] = self._run(database)
        return known

    def check(self, database: Database, case: Case) -> None:
        """Fail unless the case succeeded and read what it reads without the proxy."""
        outcome = self.report(database)[case.name]
        assert not outcome.error, outcome.error
        direct = Database("direct", database.direct_dsn, database.direct_dsn)
        expected = self.report(direct)[case.name].value
        assert outcome.value == expected, f"{outcome.value}\n\ndirect:\n{expected}"

    def _run(self, database: Database) -> dict[str, Outcome]:
        with psycopg.connect(database.direct_dsn, autocommit=True) as connection:
            connection.execute(_SCHEMA)
        done = subprocess.run(
            self._command,
            cwd=self._directory,
            env=os.environ
            | {
                "DRIVER_URL": database.dsn,
                "DRIVER_DIRECT_URL": database.direct_dsn,
                "TZ": "UTC",
            },
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {
            line["case"]: Outcome(line["value"], "" if line["ok"] else line["error"])
            for line in lines
        }


def cases_of(driver: str, sources: Path) -> list[Case]:
    """List the cases in a file or a directory: each line that starts with `test("…"`.

    Tests are named before a toolchain is looked for.
    """
    files = [sources] if sources.is_file() else sorted(sources.iterdir())
    pattern = re.compile(r'^\s*test\(\s*"([^"]+)"', re.MULTILINE)
    return [
        Case(driver, name)
        for source in files
        if source.is_file()
        for name in pattern.findall(source.read_text())
    ]


def find_toolchain(*names: str) -> list[str]:
    """Return the paths of a toolchain's programs; skip the test if one is missing."""
    found = [shutil.which(name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [path for path in found if path is not None]


def install(command: list[str | Path], directory: Path) -> None:
    """Run a step that fetches or builds; raise AssertionError with its words."""
    done = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=TEST_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
