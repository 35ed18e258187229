"""Operations: what operators read and write in the control plane.

The SQL of the command line and the admin pages; each write leaves an event, with
the actor, in the same transaction. `Store` is built on it and supplies sessions.
What is written reaches the running proxies by the schema's triggers, never by a
call from here. Who may operate is not decided here.
"""

from __future__ import annotations

import datetime
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from uuid import UUID

import orjson

from ogelproxy.config import Secret
from ogelproxy.errors import OperationRefused, SecretUnreadable
from ogelproxy.tenants.model import (
    HANDLE,
    ApiKey,
    Database,
    DatabaseType,
    KeyVerifier,
    LimiterMode,
    Organization,
    PoolMode,
)
from ogelproxy.tenants.vault import Vault

#: A tenant moved to a cheaper tier was moved at least this long ago the last time.
TIER_HYSTERESIS = datetime.timedelta(hours=24)
REENCRYPT_ROWS = 200  # rows of one transaction

#: What may be set of a tier, and its SQL type.
TIER_LIMITS = {
    "max_connections": "integer",
    "max_queries_per_second": "double precision",
    "max_storage_gb": "double precision",
    "may_burst": "boolean",
    "monthly_fee": "numeric",
    "included_vcpu_hours": "double precision",
    "included_memory_gb_hours": "double precision",
    "overage_vcpu_hour": "numeric",
    "overage_gb_hour": "numeric",
    "max_databases": "integer",
    "statement_timeout": "double precision",
    "idle_in_transaction_timeout": "double precision",
    "work_mem_kb": "integer",
    "weight": "integer",
    "max_in_flight": "integer",
}

DSN_SCHEMES = {
    DatabaseType.POSTGRES: ("postgresql", "postgres"),
    DatabaseType.NEON: ("postgresql", "postgres"),
    DatabaseType.CONVEX: ("https", "http"),
    DatabaseType.REDIS: ("redis", "rediss"),
    DatabaseType.MONGODB: ("mongodb", "mongodb+srv"),
}

_ORGANIZATIONS = """
SELECT o.*,
       (SELECT count(*) FROM platform.api_keys k
        WHERE k.org_id = o.id AND k.revoked_at IS NULL) AS key_count,
       (SELECT count(*) FROM platform.database_credentials d
        WHERE d.org_id = o.id AND d.is_active) AS database_count
FROM platform.organizations o
"""


class Session(Protocol):
    """A connection to the control plane, as far as it is used here."""

    async def execute(self, query: str, /, *args: object) -> str: ...
    async def executemany(
        self, command: str, /, args: Iterable[Sequence[object]]
    ) -> None: ...
    async def fetch(self, query: str, /, *args: object) -> list[Any]: ...
    async def fetchrow(self, query: str, /, *args: object) -> Any: ...
    async def fetchval(self, query: str, /, *args: object) -> Any: ...


class Sessions(ABC):
    """What lends connections to the control plane."""

    @abstractmethod
    def _session(self) -> AbstractAsyncContextManager[Session]:
        """Lend a session without a transaction."""

    @abstractmethod
    def _transaction(self) -> AbstractAsyncContextManager[Session]:
        """Lend a session in a transaction that commits unless an error is raised."""


class Operations(Sessions):
    """What operators may do; every method may raise OperationRefused, one sentence.

    `actor` names in the audit who did it.
    """

    @property
    @abstractmethod
    def _vault(self) -> Vault: ...

    async def list_organizations(self) -> list[Organization]:
        """Return all organisations, by handle."""
        async with self._session() as session:
            rows = await session.fetch(_ORGANIZATIONS + "ORDER BY o.handle")
        return [_organization(row) for row in rows]

    async def fetch_organization(self, handle: str) -> Organization:
        """Return one organisation."""
        async with self._session() as session:
            row = await session.fetchrow(_ORGANIZATIONS + "WHERE o.handle = $1", handle)
        if row is None:
            raise unknown(handle)
        return _organization(row)

    async def fetch_scram(self, handle: str) -> tuple[bytes, int]:
        """Return salt and iteration count for the verifiers of the keys."""
        async with self._session() as session:
            row = await session.fetchrow(
                "SELECT scram_salt, scram_iterations FROM platform.organizations "
                "WHERE handle = $1",
                handle,
            )
        if row is None:
            raise unknown(handle)
        return row["scram_salt"], row["scram_iterations"]

    async def list_keys(self, handle: str) -> list[ApiKey]:
        """Return the organisation's API keys, revoked ones too, oldest first."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT id, name, prefix, created_at, last_used_at, revoked_at "
                "FROM platform.api_keys WHERE org_id = $1 ORDER BY created_at, id",
                await _id(session, handle),
            )
        return [ApiKey(**row) for row in rows]

    async def list_databases(self, handle: str) -> list[Database]:
        """Return the organisation's databases, dropped ones too, by name."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT * FROM platform.database_credentials "
                "WHERE org_id = $1 ORDER BY name",
                await _id(session, handle),
            )
        return [_database(row) for row in rows]

    async def create_organization(
        self, handle: str, name: str, tier: str = "free", *, actor: str
    ) -> None:
        """Create an active organisation without keys and databases."""
        if not HANDLE.fullmatch(handle):
            raise OperationRefused(
                f"{handle!r} is no handle: org_ and 1 to 56 of a-z, 0-9 and _"
            )
        async with self._transaction() as session:
            org_id = await session.fetchval(
                "INSERT INTO platform.organizations (handle, name, tier, scram_salt) "
                "VALUES ($1, $2, $3, $4) RETURNING id",
                *(handle, name, tier, secrets.token_bytes(16)),
            )
            await record_event(
                session, actor, "organization.create", org_id, handle=handle, tier=tier
            )

    async def set_tier(
        self, handle: str, tier: str, *, force: bool = False, actor: str
    ) -> None:
        """Move the organisation to a tier.

        To a cheaper one not within TIER_HYSTERESIS of the last move, unless forced.
        """
        async with self._transaction() as session:
            org = await _lock(session, handle)
            fee = await session.fetchval(
                "SELECT monthly_fee FROM platform.tier_limits WHERE name = $1", tier
            )
            if fee is None:
                raise OperationRefused(f"tier {tier} does not exist")
            if tier == org["tier"]:
                return
            age = org["tier_age"]
            is_fresh = age is not None and age < TIER_HYSTERESIS
            if fee < org["monthly_fee"] and is_fresh and not force:
                hours = (TIER_HYSTERESIS - age) / datetime.timedelta(hours=1)
                raise OperationRefused(
                    f"{handle} changed its tier less than 24 h ago: it may move down "
                    f"in {hours:.1f} h, or now when forced"
                )
            await session.execute(
                "UPDATE platform.organizations SET tier = $2 WHERE id = $1",
                *(org["id"], tier),
            )
            await record_event(
                session,
                actor,
                "organization.set_tier",
                org["id"],
                before=org["tier"],
                after=tier,
                is_forced=force,
            )

    async def suspend(self, handle: str, *, actor: str) -> None:
        """Refuse the organisation's connections, open ones included."""
        await self._set(handle, "suspend", actor, status="suspended")

    async def resume(self, handle: str, *, actor: str) -> None:
        """Undo `suspend`."""
        await self._set(handle, "resume", actor, status="active")

    async def set_limiter(
        self, handle: str, mode: LimiterMode, max_wait: float, *, actor: str
    ) -> None:
        """Set what the limiter does, and the seconds (to 300) a query may wait."""
        await self._set(
            handle,
            "set_limiter",
            actor,
            limiter_mode=mode.value,
            max_wait_ms=round(max_wait * 1000),
        )

    async def set_connections(
        self, handle: str, maximum: int | None, *, actor: str
    ) -> None:
        """Set a maximum of connections of its own; None is the tier's."""
        await self._set(handle, "set_connections", actor, connections_override=maximum)

    async def create_key(
        self,
        handle: str,
        name: str,
        stored_key: bytes,
        server_key: bytes,
        prefix: str,
        *,
        actor: str,
    ) -> KeyVerifier:
        """Add an API key by its verifier, made with the tenant's salt and iterations.

        `prefix` is the part of the key that may be shown.
        """
        async with self._transaction() as session:
            org = await _lock(session, handle)
            key_id = await session.fetchval(
                "INSERT INTO platform.api_keys "
                "(org_id, name, stored_key, server_key, prefix) "
                "VALUES ($1, $2, $3, $4, $5) RETURNING id",
                *(org["id"], name, stored_key, server_key, prefix),
            )
            await record_event(
                session, actor, "key.create", org["id"], key=str(key_id), name=name
            )
        return KeyVerifier(key_id, name, stored_key, server_key)

    async def revoke_key(self, handle: str, key_id: UUID, *, actor: str) -> None:
        """End a key, and with it the connections that logged in by it."""
        async with self._transaction() as session:
            org = await _lock(session, handle)
            name = await session.fetchval(
                "UPDATE platform.api_keys SET revoked_at = now() WHERE id = $1 "
                "AND org_id = $2 AND revoked_at IS NULL RETURNING name",
                *(key_id, org["id"]),
            )
            if name is None:
                raise OperationRefused(f"{handle} has no live key {key_id}")
            await record_event(
                session, actor, "key.revoke", org["id"], key=str(key_id), name=name
            )

    async def create_database(
        self,
        handle: str,
        name: str,
        type: DatabaseType,
        dsn: Secret,
        pool_mode: PoolMode = PoolMode.AUTO,
        *,
        actor: str,
    ) -> Database:
        """Add a database, if the tier allows one more.

        A dropped one of the same name is replaced, under a new id, so that nothing
        kept for the old target is used for the new one.
        """
        _check_dsn(type, dsn)
        async with self._transaction() as session:
            org = await _lock(session, handle)
            count = await session.fetchval(
                "SELECT count(*) FROM platform.database_credentials "
                "WHERE org_id = $1 AND is_active",
                org["id"],
            )
            maximum = org["max_databases"]
            if maximum is not None and count >= maximum:
                raise OperationRefused(
                    f"{handle} has {count} of the {maximum} databases that tier "
                    f"{org['tier']} allows"
                )
            row = await session.fetchrow(
                "INSERT INTO platform.database_credentials AS old "
                "(org_id, name, database_type, connection_string, pool_mode) "
                "VALUES ($1, $2, $3, $4, $5) ON CONFLICT (org_id, name) DO UPDATE "
                "SET id = EXCLUDED.id, database_type = EXCLUDED.database_type, "
                "connection_string = EXCLUDED.connection_string, "
                "pool_mode = EXCLUDED.pool_mode, created_at = EXCLUDED.created_at, "
                "is_active = true WHERE NOT old.is_active RETURNING *",
                *(org["id"], name, type, self._vault.encrypt(dsn), pool_mode),
            )
            if row is None:
                raise OperationRefused(f"{handle} has a database {name} already")
            await record_event(
                session, actor, "database.create", org["id"], name=name, type=type
            )
        return _database(row)

    async def set_dsn(self, handle: str, name: str, dsn: Secret, *, actor: str) -> None:
        """Give a database another connection string, after a new password say."""
        async with self._transaction() as session:
            org = await _lock(session, handle)
            type = await session.fetchval(
                "SELECT database_type FROM platform.database_credentials "
                "WHERE org_id = $1 AND name = $2 AND is_active",
                *(org["id"], name),
            )
            if type is None:
                raise OperationRefused(f"{handle} has no active database {name}")
            _check_dsn(DatabaseType(type), dsn)
            await session.execute(
                "UPDATE platform.database_credentials SET connection_string = $3 "
                "WHERE org_id = $1 AND name = $2",
                *(org["id"], name, self._vault.encrypt(dsn)),
            )
            await record_event(session, actor, "database.set_dsn", org["id"], name=name)

    async def drop_database(self, handle: str, name: str, *, actor: str) -> None:
        """Stop routing to a database; its data stays where it is."""
        async with self._transaction() as session:
            org = await _lock(session, handle)
            dropped = await session.fetchval(
                "UPDATE platform.database_credentials SET is_active = false "
                "WHERE org_id = $1 AND name = $2 AND is_active RETURNING true",
                *(org["id"], name),
            )
            if dropped is None:
                raise OperationRefused(f"{handle} has no active database {name}")
            await record_event(session, actor, "database.drop", org["id"], name=name)

    async def set_tier_limit(
        self, tier: str, limit: str, value: str | None, *, actor: str
    ) -> None:
        """Set one of TIER_LIMITS, given as text; None where it may be without."""
        if limit not in TIER_LIMITS:
            raise OperationRefused(
                f"{limit!r} is no limit of a tier: {', '.join(TIER_LIMITS)}"
            )
        async with self._transaction() as session:
            is_known = await session.fetchval(
                f"UPDATE platform.tier_limits SET {limit} = "
                f"$2::text::{TIER_LIMITS[limit]} WHERE name = $1 RETURNING true",
                *(tier, value),
            )
            if not is_known:
                raise OperationRefused(f"tier {tier} does not exist")
            await record_event(
                session, actor, "tier.set", None, tier=tier, limit=limit, value=value
            )

    async def reencrypt(self, *, actor: str) -> int:
        """Encrypt all connection strings with the first key; return how many.

        Those that no key decrypts stay as they are and are named in the refusal.
        """
        count, unreadable = 0, list[str]()
        last = UUID(int=0)
        while True:
            async with self._transaction() as session:
                rows = await session.fetch(
                    "SELECT d.id, d.name, d.connection_string, o.handle "
                    "FROM platform.database_credentials d "
                    "JOIN platform.organizations o ON o.id = d.org_id "
                    "WHERE d.id > $1 ORDER BY d.id LIMIT $2 FOR UPDATE OF d",
                    *(last, REENCRYPT_ROWS),
                )
                rotated = []
                for row in rows:
                    last = row["id"]
                    try:
                        token = self._vault.rotate(row["connection_string"])
                        rotated.append((last, token))
                    except SecretUnreadable:
                        unreadable.append(f"{row['handle']}/{row['name']}")
                await session.executemany(
                    "UPDATE platform.database_credentials SET connection_string = $2 "
                    "WHERE id = $1",
                    rotated,
                )
                count += len(rotated)
                if len(rows) < REENCRYPT_ROWS:
                    await record_event(
                        session,
                        actor,
                        "database.reencrypt",
                        None,
                        count=count,
                        unreadable=unreadable,
                    )
                    break
        if unreadable:
            raise OperationRefused(
                f"{count} connection strings re-encrypted, but no key decrypts: "
                + ", ".join(unreadable)
            )
        return count

    async def record_key_uses(self, uses: Mapping[UUID, datetime.datetime]) -> None:
        """Note when keys were last used; not an operator's act, so no event."""
        async with self._transaction() as session:
            for table in ("api_keys", "operator_keys"):
                await session.execute(
                    f"UPDATE platform.{table} k "
                    "SET last_used_at = greatest(k.last_used_at, u.at) FROM unnest("
                    "$1::uuid[], $2::timestamptz[]) AS u (id, at) WHERE k.id = u.id",
                    *(list(uses), list(uses.values())),
                )

    async def _set(
        self, handle: str, action: str, actor: str, **columns: str | int | None
    ) -> None:
        async with self._transaction() as session:
            org = await _lock(session, handle)
            changes = ", ".join(
                f"{column} = ${position}" for position, column in enumerate(columns, 2)
            )
            await session.execute(
                f"UPDATE platform.organizations SET {changes} WHERE id = $1",
                *(org["id"], *columns.values()),
            )
            await record_event(
                session, actor, f"organization.{action}", org["id"], **columns
            )


async def _id(session: Session, handle: str) -> UUID:
    org_id: UUID | None = await session.fetchval(
        "SELECT id FROM platform.organizations WHERE handle = $1", handle
    )
    if org_id is None:
        raise unknown(handle)
    return org_id


async def _lock(session: Session, handle: str) -> Mapping[str, Any]:
    """Return the organisation with what its tier means here, locked until commit."""
    row: Mapping[str, Any] | None = await session.fetchrow(
        "SELECT o.id, o.tier, now() - o.tier_changed_at AS tier_age, "
        "t.monthly_fee, t.max_databases FROM platform.organizations o "
        "JOIN platform.tier_limits t ON t.name = o.tier "
        "WHERE o.handle = $1 FOR UPDATE OF o",
        handle,
    )
    if row is None:
        raise unknown(handle)
    return row


async def record_event(
    session: Session, actor: str, action: str, org_id: UUID | None, **details: object
) -> None:
    """Leave an event in the audit."""
    await session.execute(
        "INSERT INTO platform.events (actor, action, org_id, details) "
        "VALUES ($1, $2, $3, $4)",
        *(actor, action, org_id, orjson.dumps(details).decode()),
    )


def _check_dsn(type: DatabaseType, dsn: Secret) -> None:
    schemes = DSN_SCHEMES[type]
    if dsn.get_secret_value().partition("://")[0] not in schemes:
        raise OperationRefused(
            f"the connection string of a {type} database starts with "
            + " or ".join(f"{scheme}://" for scheme in schemes)
        )


def unknown(handle: str) -> OperationRefused:
    """The refusal for an organisation that isn't there."""
    return OperationRefused(f"organisation {handle} does not exist")


def _organization(row: Mapping[str, Any]) -> Organization:
    return Organization(
        id=row["id"],
        handle=row["handle"],
        name=row["name"],
        tier=row["tier"],
        is_suspended=row["status"] == "suspended",
        limiter_mode=LimiterMode(row["limiter_mode"]),
        max_wait=row["max_wait_ms"] / 1000,
        connections_override=row["connections_override"],
        key_count=row["key_count"],
        database_count=row["database_count"],
        tier_changed_at=row["tier_changed_at"],
        created_at=row["created_at"],
    )


def _database(row: Mapping[str, Any]) -> Database:
    return Database(
        id=row["id"],
        name=row["name"],
        type=DatabaseType(row["database_type"]),
        pool_mode=PoolMode(row["pool_mode"]),
        is_active=row["is_active"],
        created_at=row["created_at"],
    )
