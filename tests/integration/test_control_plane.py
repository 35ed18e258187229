"""The control plane on a real Postgres: schema, store, and how changes travel."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from ogelproxy.config import Control, Secret
from ogelproxy.errors import ConfigInvalid, ControlUnavailable, OperationRefused
from ogelproxy.tenants.directory import Directory
from ogelproxy.tenants.model import (
    DatabaseType,
    LimiterMode,
    PoolMode,
    Tenant,
    UsageDay,
)
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from tests.fixtures.postgres import Postgres

OLD = "an old passphrase of operators"
NEW = "a new passphrase of operators"
DSN = Secret("postgresql://role:password@10.0.0.1/db")
ME = "test"


class Plane:
    """A migrated control plane and plain SQL beside it."""

    def __init__(self, postgres: Postgres, name: str) -> None:
        self.postgres = postgres
        self.name = name
        self.store = self.another()

    def another(self, keys: str = OLD) -> Store:
        """Return one more store on it, as another process has one."""
        control = Control(database_url=Secret(self.postgres.dsn(self.name)))
        return Store(control, Vault(Secret(keys)))

    async def grant(self, right: LiteralString, role: str) -> None:
        grant = sql.SQL("GRANT " + right + " TO {}")
        await self.sql(grant.format(sql.Identifier(role)))

    async def sql(
        self, statement: LiteralString | sql.Composed, *values: object
    ) -> list[object]:
        """Run one statement as people do, in a connection of its own."""
        async with await psycopg.AsyncConnection.connect(
            self.postgres.dsn(self.name), autocommit=True
        ) as connection:
            cursor = await connection.execute(statement, values)
            rows = await cursor.fetchall() if cursor.description else []
            return [row[0] if len(row) == 1 else row for row in rows]

    async def tenant(self, handle: str = "org_a") -> Tenant:
        found = await self.store.fetch_tenant(handle)
        assert found is not None
        return found

    async def populate(self, handle: str = "org_a", tier: str = "free") -> None:
        """Make an organisation with a key and a database."""
        await self.store.create_organization(handle, "A", tier, actor=ME)
        await self.add_key(handle)
        await self.store.create_database(
            handle, "app", DatabaseType.POSTGRES, DSN, actor=ME
        )

    async def add_key(self, handle: str = "org_a") -> UUID:
        verifier = (b"s" * 32, b"v" * 32)
        key = await self.store.create_key(handle, "k", *verifier, "ogk_abc", actor=ME)
        return key.id


class Watched(Directory):
    """A directory whose changes a test can await."""

    def __init__(self, store: Store, config: Control) -> None:
        super().__init__(store, config)
        self.changes: asyncio.Queue[tuple[Tenant, Tenant | None]] = asyncio.Queue()
        self.subscribe(lambda old, new: self.changes.put_nowait((old, new)))

    async def next(self) -> Tenant | None:
        """Return what a change made, which has a second to arrive."""
        async with asyncio.timeout(1):
            return (await self.changes.get())[1]


@pytest.fixture
async def plane(postgres: Postgres) -> AsyncIterator[Plane]:
    made = Plane(postgres, postgres.create_database())
    async with made.store:
        await made.store.migrate()
        yield made


@asynccontextmanager
async def watching(plane: Plane, *handles: str) -> AsyncIterator[Watched]:
    """Start a directory with some tenants in memory."""
    directory = Watched(plane.store, Control())
    await directory.start()
    try:
        for handle in handles or ("org_a",):
            assert await directory.find(handle) is not None
        yield directory
    finally:
        await directory.stop()


# Schema


async def test_instances_that_start_together_migrate_once(postgres: Postgres) -> None:
    plane = Plane(postgres, postgres.create_database())
    stores = [plane.another() for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.migrate() for store in stores))
    await asyncio.gather(*(store.close() for store in stores))
    names = await plane.sql("SELECT name FROM platform.migrations ORDER BY 1")
    assert names[0] == "0001_platform.sql"
    assert await plane.sql("SELECT count(*) FROM platform.tier_limits") == [4]


async def test_an_owner_of_the_schema_alone_may_migrate_again(
    plane: Plane, postgres: Postgres
) -> None:
    role = postgres.create_role()
    await plane.grant("USAGE ON SCHEMA platform", role)
    await plane.grant("SELECT ON platform.migrations", role)
    url = Secret(postgres.dsn(plane.name, role))
    async with Store(Control(database_url=url), None) as store:
        await store.migrate()


async def test_the_seeded_tiers_are_those_of_the_price_list(plane: Plane) -> None:
    tiers = {tier.name: tier for tier in await plane.store.list_tiers()}
    assert list(tiers) == ["free", "starter", "pro", "enterprise"]
    figures = {
        name: (
            tier.max_connections,
            tier.max_queries_per_second,
            tier.max_storage_gb,
            tier.monthly_fee,
            tier.included_vcpu_hours,
            tier.included_memory_gb_hours,
            tier.overage_vcpu_hour,
            tier.overage_gb_hour,
            tier.max_databases,
            tier.bucket_capacity,
            tier.weight,
            tier.max_in_flight,
        )
        for name, tier in tiers.items()
    }
    assert figures == {
        "free": (5, 10, 1, 0, 5, 10, None, None, 1, 10, 1, None),
        "starter": (10, 50, 10, 10, 25, 50, 0.15, 0.05, 3, 250, 2, None),
        "pro": (50, 200, 100, 50, 200, 500, 0.12, 0.04, None, 1000, 10, None),
        "enterprise": (
            *(200, 1000, 1000, 200, 1000, 2000, 0.10, 0.03, None, 5000, 40, None),
        ),
    }


async def test_a_password_in_clear_can_not_be_stored(plane: Plane) -> None:
    await plane.populate()
    with pytest.raises(psycopg.errors.CheckViolation):
        await plane.sql(
            "UPDATE platform.database_credentials SET connection_string = %s",
            DSN.get_secret_value(),
        )


@pytest.mark.parametrize(
    "table", ["organizations", "api_keys", "database_credentials", "tier_limits"]
)
async def test_truncate_is_refused_because_no_proxy_would_hear_of_it(
    plane: Plane, table: str
) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="use DELETE"):
        await plane.sql(
            sql.SQL("TRUNCATE {} CASCADE").format(sql.Identifier("platform", table))
        )


# Reading


async def test_a_tenant_has_its_live_keys_and_active_databases(plane: Plane) -> None:
    await plane.populate(tier="pro")
    revoked = await plane.add_key()
    await plane.store.revoke_key("org_a", revoked, actor=ME)
    await plane.store.create_database(
        "org_a",
        "cache",
        DatabaseType.REDIS,
        Secret("redis://h"),
        PoolMode.SESSION,
        actor=ME,
    )
    await plane.store.create_database(
        "org_a", "old", DatabaseType.POSTGRES, DSN, actor=ME
    )
    await plane.store.drop_database("org_a", "old", actor=ME)
    await plane.store.set_limiter("org_a", LimiterMode.WARN, 1.5, actor=ME)
    await plane.store.set_connections("org_a", 7, actor=ME)

    tenant = await plane.tenant()
    assert tenant.tier.name == "pro"
    assert [(key.stored_key, key.server_key) for key in tenant.keys] == [
        (b"s" * 32, b"v" * 32)
    ]
    assert list(tenant.databases) == ["app", "cache"]
    assert tenant.databases["app"].dsn == DSN
    assert tenant.databases["app"].pool_mode is PoolMode.AUTO
    assert tenant.databases["cache"].type is DatabaseType.REDIS
    assert tenant.databases["cache"].pool_mode is PoolMode.SESSION
    assert (tenant.limiter_mode, tenant.max_wait) == (LimiterMode.WARN, 1.5)
    assert tenant.max_connections == 7
    assert not tenant.is_suspended
    assert len(tenant.salt) == 16
    assert "password" not in repr(tenant)
    salt = await plane.store.fetch_scram("org_a")
    assert salt == (tenant.salt, tenant.iterations)


async def test_an_unknown_tenant_is_none(plane: Plane) -> None:
    assert await plane.store.fetch_tenant("org_nobody") is None
    assert await plane.store.fetch_versions(["org_nobody"]) == {}


async def test_one_unreadable_database_leaves_the_others(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    await plane.populate(tier="pro")
    async with plane.another(NEW) as store:
        await store.create_database(
            "org_a", "other", DatabaseType.POSTGRES, DSN, actor=ME
        )
    assert list((await plane.tenant()).databases) == ["app"]
    assert "database other of org_a" in caplog.text


async def test_nobody_answering_is_control_unavailable() -> None:
    control = Control(database_url=Secret("postgresql://u:secret@127.0.0.1:1/x"))
    async with Store(control, None) as store:
        with pytest.raises(ControlUnavailable) as caught:
            await store.fetch_versions(["org_a"])
        assert "secret" not in str(caught.value)
        with pytest.raises(ControlUnavailable):
            await store.migrate()


async def test_a_malformed_url_is_told_without_its_password() -> None:
    url = Secret("postgresql://user:pass/word@host:port/db")
    async with Store(Control(database_url=url), None) as store:
        with pytest.raises(ConfigInvalid) as caught:
            await store.fetch_versions(["org_a"])
        assert "word" not in str(caught.value)
        with pytest.raises(ConfigInvalid):
            await Directory(store, Control()).start()


async def test_a_control_plane_without_tables_says_what_to_do(
    postgres: Postgres,
) -> None:
    async with Plane(postgres, postgres.create_database()).store as store:
        with pytest.raises(ControlUnavailable, match="it migrates"):
            await store.list_organizations()


# How changes travel


CHANGES: dict[str, LiteralString] = {
    "suspended": "UPDATE platform.organizations SET status = 'suspended'",
    "moved": "UPDATE platform.organizations SET tier = 'pro'",
    "limiter": "UPDATE platform.organizations SET limiter_mode = 'off'",
    "override": "UPDATE platform.organizations SET connections_override = 0",
    "revoked": "UPDATE platform.api_keys SET revoked_at = now()",
    "key deleted": "DELETE FROM platform.api_keys",
    "key added": "INSERT INTO platform.api_keys (org_id, name, stored_key, "
    "server_key, prefix) SELECT org_id, 'two', stored_key, server_key, prefix "
    "FROM platform.api_keys",
    "deactivated": "UPDATE platform.database_credentials SET is_active = false",
    "renamed": "UPDATE platform.database_credentials SET name = 'other'",
    "tier": "UPDATE platform.tier_limits SET max_connections = 6 WHERE name = 'free'",
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_plain_update_reaches_a_running_proxy_within_a_second(
    plane: Plane, change: str
) -> None:
    await plane.populate()
    async with watching(plane) as directory:
        before = directory.peek("org_a")
        await plane.sql(CHANGES[change])
        after = await directory.next()
        assert before is not None and after is not None
        assert after.version > before.version
        assert after == await plane.tenant()
        assert after != before


async def test_a_deleted_organisation_reaches_a_running_proxy(plane: Plane) -> None:
    await plane.populate()
    async with watching(plane) as directory:
        await plane.sql("DELETE FROM platform.organizations")
        assert await directory.next() is None
        assert await directory.find("org_a") is None
        await plane.populate()
        async with asyncio.timeout(1):
            while await directory.find("org_a") is None:
                await plane.sql("SELECT")  # a round trip behind the news


async def test_a_key_that_moves_changes_both_organisations(plane: Plane) -> None:
    await plane.populate("org_a")
    await plane.populate("org_b")
    async with watching(plane, "org_a", "org_b") as directory:
        await plane.sql(
            "UPDATE platform.api_keys SET org_id = "
            "(SELECT id FROM platform.organizations WHERE handle = 'org_b')"
        )
        changed = [await directory.next(), await directory.next()]
        assert {(new.handle, len(new.keys)) for new in changed if new is not None} == {
            ("org_a", 0),
            ("org_b", 2),
        }


async def test_one_who_may_only_update_rows_reaches_the_proxies_too(
    plane: Plane, postgres: Postgres
) -> None:
    await plane.populate()
    role = postgres.create_role()
    await plane.grant("USAGE ON SCHEMA platform", role)
    await plane.grant("SELECT, UPDATE ON platform.api_keys", role)
    async with watching(plane) as directory:
        with psycopg.connect(postgres.dsn(plane.name, role)) as connection:
            connection.execute("UPDATE platform.api_keys SET revoked_at = now()")
        changed = await directory.next()
        assert changed is not None and changed.keys == ()


async def test_the_use_of_a_key_is_noted_but_not_announced(plane: Plane) -> None:
    await plane.populate()
    before = await plane.tenant()
    at = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    later = at + datetime.timedelta(days=1)
    key = before.keys[0].id
    await plane.store.record_key_uses({key: later, uuid4(): at})
    await plane.store.record_key_uses({key: at})
    assert [key.last_used_at for key in await plane.store.list_keys("org_a")] == [later]
    assert (await plane.tenant()).version == before.version


async def test_a_tiers_change_is_announced_once_for_all_its_organisations(
    plane: Plane,
) -> None:
    for number in range(20):
        await plane.store.create_organization(f"org_{number}", "A", actor=ME)
    heard: asyncio.Queue[str] = asyncio.Queue()
    is_attached = asyncio.Event()
    listening = asyncio.create_task(
        plane.store.listen(heard.put_nowait, lambda _: is_attached.set())
    )
    await is_attached.wait()
    before = await plane.store.fetch_versions([f"org_{n}" for n in range(20)])
    await plane.store.set_tier_limit("free", "max_connections", "6", actor=ME)
    await plane.sql("UPDATE platform.organizations SET name = 'B' WHERE name = 'A'")
    async with asyncio.timeout(1):
        assert await heard.get() == "tier:free"
        payloads = [await heard.get() for _ in range(20)]
    listening.cancel()
    assert sorted(payloads) == sorted(f"org:org_{n}" for n in range(20))
    after = await plane.store.fetch_versions(list(before))
    assert all(after[handle] > before[handle] for handle in before)


async def test_versions_rise_in_the_order_of_commits(plane: Plane) -> None:
    await plane.populate()
    dsn = plane.postgres.dsn(plane.name)
    async with (
        await psycopg.AsyncConnection.connect(dsn) as first,
        await psycopg.AsyncConnection.connect(dsn) as second,
    ):
        await first.execute("UPDATE platform.api_keys SET name = 'first'")
        waiting = asyncio.create_task(
            second.execute("UPDATE platform.organizations SET name = 'second'")
        )
        await _until_waiting(plane, second)
        # Takes a later number than the one that `second` could have taken early.
        await first.execute("UPDATE platform.organizations SET name = 'first'")
        await first.commit()
        between = (await plane.tenant()).version
        await waiting
        await second.commit()
    tenant = await plane.tenant()
    assert tenant.name == "second"
    assert tenant.version > between


async def test_a_move_into_a_tier_that_is_changing_is_not_overlooked(
    plane: Plane,
) -> None:
    await plane.populate()
    dsn = plane.postgres.dsn(plane.name)
    async with (
        await psycopg.AsyncConnection.connect(dsn) as changing,
        await psycopg.AsyncConnection.connect(dsn) as moving,
    ):
        await changing.execute(
            "UPDATE platform.tier_limits SET max_connections = 51 WHERE name = 'pro'"
        )
        move = asyncio.create_task(
            moving.execute("UPDATE platform.organizations SET tier = 'pro'")
        )
        await _until_waiting(plane, moving)
        await changing.commit()
        await move
        await moving.commit()
    tenant = await plane.tenant()
    assert tenant.tier.max_connections == 51
    versions = await plane.store.fetch_versions(["org_a"])
    assert versions == {"org_a": tenant.version}


async def _until_waiting(plane: Plane, session: psycopg.AsyncConnection) -> None:
    """Wait until the session waits for a lock."""
    pid = session.info.backend_pid
    while await plane.sql(
        "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted", pid
    ) == [0]:
        pass


async def test_a_lost_listener_comes_back_and_finds_what_it_missed(
    plane: Plane,
) -> None:
    await plane.populate()
    async with watching(plane) as directory:
        await plane.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE '%%listener'"
        )
        await plane.store.suspend("org_a", actor=ME)
        changed = await directory.next()
        assert changed is not None and changed.is_suspended
        await plane.store.resume("org_a", actor=ME)
        changed = await directory.next()
        assert changed is not None and not changed.is_suspended


async def test_the_known_are_served_while_postgres_is_stopped(
    plane: Plane, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    await plane.populate()
    await plane.populate("org_b")
    async with watching(plane) as directory:
        await postgres.stop()
        try:
            await _until(lambda: directory.is_degraded)
            assert await directory.find("org_a") is not None
            with pytest.raises(ControlUnavailable):
                await directory.find("org_b")
        finally:
            await postgres.start()
        await _until(lambda: not directory.is_degraded)
        assert await directory.find("org_b") is not None
        await plane.store.suspend("org_a", actor=ME)
        changed = await directory.next()
        assert changed is not None and changed.is_suspended
    assert not [line for line in caplog.records if line.levelno > logging.WARNING]


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what another process causes and nobody announces."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about in ten seconds")


# What operators do


async def test_every_write_leaves_an_event_with_its_actor(plane: Plane) -> None:
    await plane.populate()
    await plane.store.set_tier("org_a", "pro", actor="ann")
    await plane.store.suspend("org_a", actor="bob")
    rows = await plane.sql(
        "SELECT actor, action, details::text, org_id IS NOT NULL "
        "FROM platform.events WHERE kind = 'audit' ORDER BY id"
    )
    assert [row[:2] for row in rows if isinstance(row, tuple)] == [
        (ME, "organization.create"),
        (ME, "key.create"),
        (ME, "database.create"),
        ("ann", "organization.set_tier"),
        ("bob", "organization.suspend"),
    ]
    assert "password" not in str(rows)


async def test_a_moved_tier_leaves_an_event_whoever_moved_it(plane: Plane) -> None:
    await plane.populate()
    await plane.store.set_tier("org_a", "pro", actor="ann")
    await plane.sql("UPDATE platform.organizations SET tier = 'starter'")
    await plane.sql("UPDATE platform.organizations SET tier = 'starter', name = 'B'")
    assert await plane.sql(
        "SELECT action, details->>'before', details->>'after', left(actor, 4) "
        "FROM platform.events WHERE kind = 'analytics' ORDER BY id"
    ) == [
        ("tier.changed", "free", "pro", "sql:"),
        ("tier.changed", "pro", "starter", "sql:"),
    ]


async def test_a_refused_write_leaves_nothing(plane: Plane) -> None:
    await plane.populate()
    events = await plane.sql("SELECT count(*) FROM platform.events")
    before = await plane.tenant()
    store = plane.store
    refused = [
        (store.create_organization("org_a", "A", actor=ME), "exists already"),
        (store.create_organization("A", "A", actor=ME), "is no handle"),
        (store.create_organization("org_c", "C", "gold", actor=ME), "does not exist"),
        (store.create_organization("org_c", "", actor=ME), "out of its range"),
        (store.suspend("org_nobody", actor=ME), "org_nobody does not exist"),
        (store.set_tier("org_a", "gold", actor=ME), "tier gold does not exist"),
        (store.set_limiter("org_a", LimiterMode.OFF, 301, actor=ME), "out of its"),
        (store.set_connections("org_a", 2**40, actor=ME), "range"),
        (store.revoke_key("org_a", uuid4(), actor=ME), "no live key"),
        (store.drop_database("org_a", "other", actor=ME), "no active database"),
        (store.set_dsn("org_a", "other", DSN, actor=ME), "no active database"),
        (store.set_tier_limit("free", "nothing", "1", actor=ME), "is no limit"),
        (store.set_tier_limit("gold", "may_burst", "t", actor=ME), "does not exist"),
        (store.set_tier_limit("free", "max_databases", "x", actor=ME), "invalid input"),
        (store.set_tier_limit("free", "work_mem_kb", None, actor=ME), "out of its"),
        (
            store.set_tier_limit("free", "max_queries_per_second", "NaN", actor=ME),
            "out of its range",
        ),
        (store.list_keys("org_nobody"), "does not exist"),
        (store.fetch_organization("org_nobody"), "does not exist"),
    ]
    for operation, text in refused:
        with pytest.raises(OperationRefused, match=text):
            await operation
    assert await plane.sql("SELECT count(*) FROM platform.events") == events
    assert await plane.tenant() == before


async def test_a_tenant_moves_down_once_a_day_unless_forced(plane: Plane) -> None:
    await plane.populate(tier="pro")
    await plane.store.set_tier("org_a", "starter", actor=ME)
    with pytest.raises(OperationRefused, match=r"24\.0 h, or now when forced"):
        await plane.store.set_tier("org_a", "free", actor=ME)
    await plane.store.set_tier("org_a", "pro", actor=ME)
    await plane.store.set_tier("org_a", "free", force=True, actor=ME)
    await plane.store.set_tier("org_a", "free", actor=ME)
    await plane.store.set_tier("org_a", "starter", actor=ME)
    await plane.sql(
        "UPDATE platform.organizations SET tier_changed_at = now() - interval '24 h'"
    )
    await plane.store.set_tier("org_a", "free", actor=ME)
    assert (await plane.tenant()).tier.name == "free"


async def test_a_tier_allows_so_many_databases_however_they_race(plane: Plane) -> None:
    await plane.store.create_organization("org_a", "A", "starter", actor=ME)
    attempts = (
        plane.store.create_database(
            "org_a", f"db{number}", DatabaseType.POSTGRES, DSN, actor=ME
        )
        for number in range(6)
    )
    results = await asyncio.gather(*attempts, return_exceptions=True)
    refusals = [result for result in results if isinstance(result, OperationRefused)]
    assert len(refusals) == 3
    assert "3 of the 3 databases that tier starter allows" in str(refusals[0])
    assert len((await plane.tenant()).databases) == 3


async def test_a_database_of_a_dropped_ones_name_is_another_target(
    plane: Plane,
) -> None:
    await plane.populate(tier="pro")
    first = (await plane.tenant()).databases["app"]
    other = Secret("postgresql://elsewhere/db")
    with pytest.raises(OperationRefused, match="has a database app already"):
        await plane.store.create_database(
            "org_a", "app", DatabaseType.NEON, other, actor=ME
        )
    await plane.store.drop_database("org_a", "app", actor=ME)
    await plane.store.create_database(
        "org_a", "app", DatabaseType.NEON, other, actor=ME
    )
    second = (await plane.tenant()).databases["app"]
    assert second.id != first.id
    assert (second.dsn, second.type) == (other, DatabaseType.NEON)


async def test_a_database_keeps_its_id_under_a_new_connection_string(
    plane: Plane,
) -> None:
    await plane.populate()
    first = (await plane.tenant()).databases["app"]
    other = Secret("postgresql://role:next@10.0.0.1/db")
    await plane.store.set_dsn("org_a", "app", other, actor=ME)
    second = (await plane.tenant()).databases["app"]
    assert (second.id, second.dsn) == (first.id, other)
    with pytest.raises(OperationRefused, match="starts with postgresql://") as caught:
        await plane.store.set_dsn("org_a", "app", Secret("redis://secret"), actor=ME)
    assert "secret" not in str(caught.value)


async def test_reencrypting_makes_the_old_key_dispensable(plane: Plane) -> None:
    await plane.populate()
    await plane.populate("org_b")
    async with plane.another(f"{NEW},{OLD}") as both:
        assert await both.reencrypt(actor=ME) == 2
    async with plane.another(NEW) as new:
        tenant = await new.fetch_tenant("org_b")
        assert tenant is not None and tenant.databases["app"].dsn == DSN
    with pytest.raises(OperationRefused, match="no key decrypts: org_a/app, org_b/app"):
        try:
            await plane.store.reencrypt(actor=ME)
        except OperationRefused as error:
            # Their order is that of random ids.
            head, _, names = str(error).partition("decrypts: ")
            text = f"{head}decrypts: {', '.join(sorted(names.split(', ')))}"
            raise OperationRefused(text) from None


async def test_without_a_vault_all_but_connection_strings_can_be_operated(
    plane: Plane,
) -> None:
    await plane.populate()
    control = Control(database_url=Secret(plane.postgres.dsn(plane.name)))
    async with Store(control, None) as store:
        assert [org.handle for org in await store.list_organizations()] == ["org_a"]
        await store.suspend("org_a", actor=ME)
        with pytest.raises(ConfigInvalid, match="O7S_SECRET_KEY"):
            await store.fetch_tenant("org_a")


async def test_usage_is_summed_by_organisation_day_and_type(plane: Plane) -> None:
    await plane.populate()
    tenant = await plane.tenant()
    gone = uuid4()
    day = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    for org, kind, hour, storage in (
        (tenant.id, "postgres", 0, 1.0),
        (tenant.id, "postgres", 23, 2.0),
        (tenant.id, "redis", 5, 0.0),
        (tenant.id, "postgres", 24, 0.0),
        (gone, "postgres", 1, 0.0),
    ):
        start = day + datetime.timedelta(hours=hour)
        await plane.sql(
            "INSERT INTO platform.usage_metrics VALUES "
            "(%s, %s, 0.5, 0.25, 10, 20, 30, %s, %s, %s)",
            *(org, kind, storage, start, start + datetime.timedelta(hours=1)),
        )
    until = day + datetime.timedelta(days=1)
    rows = await plane.store.fetch_usage("org_a", day, until)
    assert rows == [
        UsageDay("org_a", day.date(), DatabaseType.POSTGRES, 20, 40, 60, 1.0, 0.5, 2.0),
        UsageDay("org_a", day.date(), DatabaseType.REDIS, 10, 20, 30, 0.5, 0.25, 0.0),
    ]
    everyone = await plane.store.fetch_usage(None, day, until)
    assert sorted({row.handle for row in everyone}) == sorted({"org_a", str(gone)})
    with pytest.raises(OperationRefused):
        await plane.store.fetch_usage("org_nobody", day, until)
