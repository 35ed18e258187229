"""Audit and analytics: who did what, what tenants met, each once, in either sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.tenants.model import OPERATORS
from tests.fixtures.engine import ACTOR, Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.mongodb import Mongo

#: Finds the events of a kind, oldest first: documents of MongoDB, or rows alike.
Found = Callable[[str], list[dict[str, Any]]]

COLLECTIONS = {"audit": "auditLogs", "analytics": "analyticsEvents"}
COLUMNS = 'key AS "_id", org_id::text AS "orgId", at, actor, action, details'


def connect_operator(proxy: Proxy, name: str) -> psycopg.Connection:
    """Open a console with a new key."""

    async def create(store: Any) -> str:
        await store.migrate()
        key = apikey.generate()
        verifier = make_verifier(key, *await store.fetch_operator_scram())
        await store.create_operator_key(
            name, *verifier, apikey.prefix(key), actor=ACTOR
        )
        return proxy.dsn(OPERATORS, key, OPERATORS)

    url = proxy.operate(create)
    connections: list[psycopg.Connection] = []

    def connect() -> bool:
        try:
            connections.append(psycopg.connect(url, autocommit=True))
        except psycopg.OperationalError:
            return False  # the proxy is told in a moment
        return True

    eventually(connect)
    return connections[0]


@pytest.fixture(params=["postgres", "mongodb"])
def found(request: pytest.FixtureRequest, own_proxy: Proxy) -> Found:
    """Where the events of `own_proxy` go, which runs."""
    own_proxy.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "0.2"
    if request.param == "mongodb":
        mongodb: Mongo = request.getfixturevalue("mongodb")
        own_proxy.settings["MONGODB_URL"] = mongodb.url

        def documents(kind: str) -> list[dict[str, Any]]:
            documents = mongodb.documents(COLLECTIONS[kind])
            return sorted(documents, key=lambda each: each["at"])

        own_proxy.start()
        return documents

    def rows(kind: str) -> list[dict[str, Any]]:
        dsn = own_proxy.postgres.dsn(own_proxy.control)
        with psycopg.connect(dsn, row_factory=dict_row) as control:
            return control.execute(
                f"SELECT {COLUMNS} FROM platform.events WHERE kind = %s ORDER BY at",  # type: ignore[arg-type]
                [kind],
            ).fetchall()

    own_proxy.start()
    return rows


def org_id(organization: Organization) -> str:
    proxy = organization.proxy

    async def fetch(store: Any) -> str:
        return str((await store.fetch_organization(organization.handle)).id)

    return proxy.operate(fetch)


def test_a_command_in_the_console_is_in_the_audit(
    own_proxy: Proxy, found: Found
) -> None:
    organization = own_proxy.create_organization()
    organization.connect("transaction").close()
    name = f"{organization.handle}/transaction"
    with connect_operator(own_proxy, "ann") as console:
        console.execute(f"PAUSE {name}".encode())
        console.execute(f"RESUME {name}".encode())
        console.execute("SHOW POOLS")
        console.execute("SELECT 1")
        with pytest.raises(psycopg.Error):
            console.execute("KILL_CLIENT 12345678")

    def acts() -> list[dict[str, Any]]:
        return [each for each in found("audit") if each["actor"] == "operator:ann"]

    eventually(lambda: len(acts()) >= 3)
    own_proxy.stop()
    pause, resume, kill = acts()
    assert (pause["action"], resume["action"]) == ("console.pause", "console.resume")
    assert pause["orgId"] == resume["orgId"] == org_id(organization)
    assert pause["details"]["command"] == f"PAUSE {name}"
    assert pause["details"]["address"] == "127.0.0.1"
    assert (kill["orgId"], kill["action"]) == (None, "console.kill_client")


def test_what_operators_write_by_command_is_in_the_audit_once(
    own_proxy: Proxy, found: Found
) -> None:
    organization = own_proxy.create_organization(tier="free")
    own = org_id(organization)

    def actions(kind: str) -> list[str]:
        return [each["action"] for each in found(kind) if each["orgId"] == own]

    eventually(lambda: "organization.set_tier" in actions("audit"))
    eventually(lambda: "tier.changed" in actions("analytics"))
    own_proxy.stop()
    own_proxy.start()
    own_proxy.stop()
    assert actions("audit") == [
        "organization.create",
        "key.create",
        *["database.create"] * len(organization.databases),
        "organization.set_tier",
    ]
    assert actions("analytics") == ["tier.changed"]
    (changed,) = (each for each in found("analytics") if each["orgId"] == own)
    assert changed["details"] == {"before": "enterprise", "after": "free"}


def test_a_tenant_that_meets_its_limits_leaves_one_prompt_for_each(
    own_proxy: Proxy, found: Found
) -> None:
    organization = own_proxy.create_organization(tier="free")
    own = org_id(organization)
    hints: list[str] = []
    clients = [organization.connect() for _ in range(5)]
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError, match="connection limit"):
            organization.connect()
    for _ in range(60):
        try:
            clients[0].execute("SELECT 1")
        except psycopg.errors.ConfigurationLimitExceeded as refused:
            hints.append(refused.diag.message_hint or "")
    for client in clients:
        client.close()
    assert "upgrade" in hints[-1]

    def prompts() -> dict[str, dict[str, Any]]:
        return {
            each["action"]: each["details"]
            for each in found("analytics")
            if each["orgId"] == own and each["action"] != "tier.changed"
        }

    eventually(lambda: len(prompts()) == 2)
    # Another process, the same hour.
    own_proxy.kill()
    own_proxy.start()
    clients = [organization.connect() for _ in range(5)]
    with pytest.raises(psycopg.OperationalError, match="connection limit"):
        organization.connect()
    for client in clients:
        client.close()
    own_proxy.stop()
    assert prompts() == {
        "upgrade_prompt.max_connections": {"tier": "free", "limit": 5},
        "upgrade_prompt.max_queries_per_second": {"tier": "free", "limit": 10.0},
    }
    names = [each["action"] for each in found("analytics") if each["orgId"] == own]
    assert len(names) <= 1 + 2 * 2  # the hour may have turned


def test_old_analytics_go_and_the_audit_stays(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "0.2"
    own_proxy.start()
    organization = own_proxy.create_organization(tier="free")
    dsn = own_proxy.postgres.dsn(own_proxy.control)
    with psycopg.connect(dsn, autocommit=True) as control:
        control.execute("UPDATE platform.events SET at = at - interval '31 days'")
        with connect_operator(own_proxy, "ann") as console:
            console.execute("RECONNECT")

        def count(kind: str) -> int:
            (number,) = control.execute(
                "SELECT count(*) FROM platform.events WHERE kind = %s", [kind]
            ).fetchone() or (0,)
            return int(number)

        eventually(lambda: count("analytics") == 0)
        assert count("audit") > len(organization.databases)
    own_proxy.stop()
