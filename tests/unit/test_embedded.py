"""EmbeddedPostgres: found, started, private, stopped, never left behind."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from ogelproxy.config import Secret
from ogelproxy.embedded import EmbeddedPostgres
from tests.fixtures.postgres import Postgres


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: only root enters it, as with `mktemp -d`."""
    with tempfile.TemporaryDirectory(prefix="o7s-") as name:
        yield Path(name)


def make(directory: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(
        directory, password=Secret(secrets.token_urlsafe(12)), settings={"fsync": "off"}
    )


def test_the_session_postgres_answers_over_tcp_and_over_its_socket(
    postgres: Postgres,
) -> None:
    for dsn in (postgres.dsn(), postgres.socket_dsn()):
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_created_role_logs_in_to_its_database(postgres: Postgres) -> None:
    role = postgres.create_role()
    name = postgres.create_database(owner=role)
    with psycopg.connect(postgres.dsn(name, role)) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (role,)
