"""psql: its meta commands, scripts and \\copy."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drivers.conftest import Database

Psql = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def psql(database: Database, binaries: Path) -> Psql:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / "psql", "-X", "-A", "-t", database.dsn, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_several_statements_of_one_option(psql: Psql) -> None:
    done = psql("-c", "SELECT 1; SELECT 'a;b'; SELECT 3")
    assert done.stdout.split() == ["1", "a;b", "3"]
    assert done.returncode == 0


def test_an_error_undoes_all_statements_of_one_option(psql: Psql) -> None:
    done = psql("-c", "INSERT INTO city (name) VALUES ('x'); SELECT 1/0")
    assert done.returncode == 1
    assert "division by zero" in done.stderr
    assert psql("-c", "SELECT count(*) FROM city").stdout.strip() == "0"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (r"\d", "city_id_seq"),
        (r"\d city", "nextval"),
        (r"\dt", "city"),
        (r"\df pg_sleep", "double precision"),
        (r"\l", "app"),
        (r"\dn", "public"),
        (r"\conninfo", "127.0.0.1"),
        (r"\encoding", "UTF8"),
        (r"\du", "role_"),
    ],
)
def test_meta_commands(
    psql: Psql, database: Database, command: str, shown: str
) -> None:
    done = psql("-c", command)
    assert done.stderr == ""
    if command == r"\l":
        shown = database.direct_dsn.rsplit("/", 1)[1]
    assert shown in done.stdout


def test_copy_from_and_to_files(psql: Psql, tmp_path: Path) -> None:
    rows = "".join(f"{n}\tname {n}\n" for n in range(1000))
    (tmp_path / "in").write_text(rows)
    done = psql(
        "-q",
        stdin=f"BEGIN;\n\\copy city FROM '{tmp_path}/in'\n"
        f"\\copy (SELECT * FROM city ORDER BY id) TO '{tmp_path}/out'\nROLLBACK;\n",
    )
    assert done.stderr == ""
    assert (tmp_path / "out").read_text() == rows


def test_a_script_goes_on_after_errors(psql: Psql) -> None:
    done = psql(stdin="SELECT 1;\nSELEC 2;\nSELECT 3;\n")
    assert done.stdout.split() == ["1", "3"]
    assert "syntax error" in done.stderr


def test_the_extended_protocol(psql: Psql) -> None:
    done = psql(stdin="SELECT $1::int + $2::int \\bind 40 2 \\g\n")
    assert done.stdout.split() == ["42"]


def test_results_in_parts(psql: Psql) -> None:
    done = psql("-v", "FETCH_COUNT=100", "-c", "SELECT generate_series(1, 1000)")
    assert done.stdout.split() == [str(n) for n in range(1, 1001)]


def test_queries_made_by_a_query(psql: Psql) -> None:
    done = psql(
        stdin="SELECT format('SELECT %s', n) FROM generate_series(1,5) n\\gexec\n"
    )
    assert done.stdout.split() == ["1", "2", "3", "4", "5"]


def test_describing_a_result(psql: Psql) -> None:
    done = psql(stdin="SELECT 1 AS a, 'x'::text AS b \\gdesc\n")
    assert done.stdout.split() == ["a|integer", "b|text"]
