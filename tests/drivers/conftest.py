"""The same test without the proxy and in each of its pool modes.

What passes direct must pass proxied. Where it can't, it is listed here, with
its reason, and must really fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from ogelproxy.embedded import find_binaries
from ogelproxy.errors import EmbeddedFailed
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy

WAYS = ("direct", "session", "transaction", "auto")

_LISTEN = "LISTEN is refused beside other statements, which run on a shared server"
_TEMPORARY = "temporary objects end with the transaction's loan of a server"
_LOCK = "a session's advisory lock ends with the transaction's loan of a server"

#: Test, way, reason: what transaction pooling can't carry from one transaction
#: to the next (auto mode keeps the server instead).
DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("test_a_cursor_with_hold_outlives_its_transaction", "transaction", _TEMPORARY),
    (
        "test_rows_are_iterated_by_a_cursor_without_a_transaction",
        "transaction",
        _TEMPORARY,
    ),
    ("test_temporary_tables_last_for_the_connection", "transaction", _TEMPORARY),
    ("test_advisory_locks_last_for_the_connection", "transaction", _LOCK),
    ("pg: keeps a temporary table", "transaction", _TEMPORARY),
    ("pg: keeps a lock of its session", "transaction", _LOCK),
    ("pg: keeps a cursor with hold", "transaction", _TEMPORARY),
    ("pg: listens beside other statements", "transaction", _LISTEN),
    ("postgres.js: keeps what a reserved connection set", "transaction", _TEMPORARY),
    ("pgx: cursor with hold", "transaction", _TEMPORARY),
    ("pgx: temporary table", "transaction", _TEMPORARY),
    ("pq: temporary table", "transaction", _TEMPORARY),
    ("pgjdbc: keeps a temporary table", "transaction", _TEMPORARY),
    ("tokio-postgres: cursor with hold", "transaction", _TEMPORARY),
    ("tokio-postgres: temporary table", "transaction", _TEMPORARY),
    ("sqlx: cursor with hold", "transaction", _TEMPORARY),
    ("sqlx: temporary table", "transaction", _TEMPORARY),
    ("sqlx: advisory lock", "transaction", _LOCK),
    ("sqlx: listener", "transaction", _LISTEN),
)


@dataclass(frozen=True)
class Database:
    """One database and the way to it."""

    way: str
    dsn: str
    direct_dsn: str

    @property
    def is_direct(self) -> bool:
        return self.way == "direct"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {(name, way): reason for name, way, reason in DIFFERENCES}
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        spec = getattr(item, "callspec", None)
        given = {} if spec is None else spec.params
        # The cases of a program have names of their own.
        name = given.get("case", getattr(item, "originalname", item.name))
        reason = reasons.get((str(name), str(given.get("database"))))
        if reason is not None:
            # Whether a lock is still there depends on who is faster.
            strict = reason is not _LOCK
            item.add_marker(pytest.mark.xfail(reason=reason, strict=strict))


@pytest.fixture(scope="session")
def drivers_organization(proxy: Proxy) -> Organization:
    made = proxy.create_organization(limiter=LimiterMode.OFF)
    with psycopg.connect(made.direct_dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE city (id serial PRIMARY KEY, name text UNIQUE)"
        )
    return made


@pytest.fixture(scope="session", params=WAYS)
def database(
    request: pytest.FixtureRequest, drivers_organization: Organization
) -> Database:
    """The organisation's database, each way."""
    way: str = request.param
    direct = drivers_organization.direct_dsn
    dsn = direct if way == "direct" else drivers_organization.dsn(way)
    return Database(way, dsn, direct)


@pytest.fixture(scope="session")
def binaries() -> Path:
    """The directory of psql and pgbench that fit the server."""
    try:
        return Path(find_binaries({}))
    except EmbeddedFailed as error:
        pytest.skip(str(error))
