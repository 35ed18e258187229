"""The demo organisations: their databases, roles, keys and rows.

Owns what `ogelproxy dev` puts on a fresh Postgres and finds again on a used one;
seeding twice changes nothing. Each organisation's role may enter its own
database and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.config import Control, Secret
from ogelproxy.embedded import EmbeddedPostgres
from ogelproxy.tenants.model import DatabaseType, LimiterMode, PoolMode
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault

LOAD_CONNECTIONS = 10_000
#: Who did it, in the control plane's audit.
ACTOR = "ogelproxy dev"


@dataclass(frozen=True, slots=True)
class DemoOrganization:
    handle: str
    tier: str
    #: Names in the URL and how each is pooled; all of them are the same data.
    databases: Mapping[str, PoolMode] = field(
        default_factory=lambda: {"app": PoolMode.AUTO}
    )
    is_unlimited: bool = False

    @property
    def database(self) -> str:
        """The database's name on the embedded Postgres."""
        return f"{self.handle}_app"


ORGANIZATIONS = (
    DemoOrganization("org_demo_free", "free"),
    DemoOrganization("org_demo_starter", "starter"),
    DemoOrganization("org_demo_pro", "pro"),
    DemoOrganization("org_demo_enterprise", "enterprise"),
    DemoOrganization(
        "org_demo_load",
        "enterprise",
        {
            "app": PoolMode.AUTO,
            "app_tx": PoolMode.TRANSACTION,
            "app_session": PoolMode.SESSION,
        },
        is_unlimited=True,
    ),
)


class Seeder:
    """Brings an embedded Postgres and its control plane to the demo's shape."""

    def __init__(
        self,
        postgres: EmbeddedPostgres,
        control: Control,
        kept: Mapping[str, Any],
        operator_key: str,
    ) -> None:
        self._postgres = postgres
        self._control = control
        self._kept = kept  # the API key and the role's password of each handle
        self._operator_key = operator_key
        assert control.secret_key is not None
        self._vault = Vault(control.secret_key)

    async def seed(self, control_database: str) -> None:
        """Make what is missing and point the rows at where Postgres is now."""
        maintenance = self._control.model_copy(
            update={"database_url": Secret(self._postgres.local_dsn())}
        )
        async with Store(maintenance, self._vault) as store:
            await self._provision(store, control_database)
        async with Store(self._control, self._vault) as store:
            await store.migrate()
            for organization in ORGANIZATIONS:
                await self._register(store, organization)
            await self._register_operator(store)

    async def _provision(self, store: Store, control_database: str) -> None:
        rows = await store.pool.fetch("SELECT datname FROM pg_database")
        databases = {row["datname"] for row in rows}
        rows = await store.pool.fetch("SELECT rolname FROM pg_roles")
        roles = {row["rolname"] for row in rows}
        if control_database not in databases:
            await _run(store, "CREATE DATABASE %I", control_database)
        for name in ("postgres", "template1", control_database):
            await _run(store, "REVOKE CONNECT ON DATABASE %I FROM PUBLIC", name)
        for organization in ORGANIZATIONS:
            role, database = organization.handle, organization.database
            if role not in roles:
                password = self._kept[role]["role_password"]
                await _run(store, "CREATE ROLE %I LOGIN PASSWORD %L", role, password)
            if database not in databases:
                await _run(store, "CREATE DATABASE %I OWNER %I", database, role)
            await _run(store, "REVOKE ALL ON DATABASE %I FROM PUBLIC", database)

    async def _register(self, store: Store, organization: DemoOrganization) -> None:
        handle, kept = organization.handle, self._kept[organization.handle]
        tenant = await store.fetch_tenant(handle)
        if tenant is None:
            await store.create_organization(
                handle, name=handle, tier=organization.tier, actor=ACTOR
            )
            tenant = await store.fetch_tenant(handle)
            assert tenant is not None
        if not tenant.keys:
            key = kept["api_key"]
            verifier = make_verifier(key, tenant.salt, tenant.iterations)
            await store.create_key(
                handle, "demo", *verifier, apikey.prefix(key), actor=ACTOR
            )
        dsn = Secret(
            self._postgres.local_dsn(
                organization.database, handle, Secret(kept["role_password"])
            )
        )
        for name, mode in organization.databases.items():
            known = tenant.databases.get(name)
            if known is not None and known.dsn == dsn:
                continue
            if known is not None:  # Postgres is elsewhere since the last start
                await store.drop_database(handle, name, actor=ACTOR)
            await store.create_database(
                handle, name, DatabaseType.POSTGRES, dsn, mode, actor=ACTOR
            )
        if organization.is_unlimited and tenant.limiter_mode is not LimiterMode.OFF:
            await store.set_limiter(handle, LimiterMode.OFF, 0.0, actor=ACTOR)
            await store.set_connections(handle, LOAD_CONNECTIONS, actor=ACTOR)

    async def _register_operator(self, store: Store) -> None:
        if await store.list_operator_keys():
            return
        key = self._operator_key
        verifier = make_verifier(key, *await store.fetch_operator_scram())
        await store.create_operator_key(
            "demo", *verifier, apikey.prefix(key), actor=ACTOR
        )


async def _run(store: Store, statement: str, *names: str) -> None:
    """Run one statement whose names and literals Postgres itself quotes."""
    places = ", ".join(f"${number}::text" for number in range(2, len(names) + 2))
    quoted = await store.pool.fetchval(
        f"SELECT format($1, {places})", statement, *names
    )
    await store.pool.execute(quoted)
