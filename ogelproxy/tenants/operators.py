"""Operators: who may use the console, as the control plane knows them.

Their keys are kept like an organisation's and reach the proxies like one, as the
record of the handle `ogel`: so the directory's memory, pushes and degraded modes hold
for them too. What they may do is `console`'s.
"""

from __future__ import annotations

from uuid import UUID

from ogelproxy.errors import OperationRefused
from ogelproxy.tenants.model import OPERATORS, ApiKey, KeyVerifier, Tenant, Tier
from ogelproxy.tenants.operations import Session, Sessions, record_event

#: Stands where a tenant's record names its tier: operators have none.
NO_TIER = Tier(
    name="",
    max_connections=0,
    max_queries_per_second=0.0,
    max_storage_gb=0.0,
    may_burst=False,
    monthly_fee=0.0,
    included_vcpu_hours=0.0,
    included_memory_gb_hours=0.0,
    overage_vcpu_hour=None,
    overage_gb_hour=None,
    max_databases=0,
)

_OPERATORS = """
SELECT o.scram_salt, o.scram_iterations, o.version,
       ARRAY(SELECT ROW(k.id, k.name, k.stored_key, k.server_key)
             FROM platform.operator_keys k WHERE k.revoked_at IS NULL
             ORDER BY k.created_at, k.id) AS keys
FROM platform.operators o
"""


async def fetch_operators(session: Session) -> Tenant | None:
    """Return the operators' record; None while there is no live key."""
    row = await session.fetchrow(_OPERATORS)
    if not row["keys"]:
        return None
    return Tenant(
        id=UUID(int=0),
        handle=OPERATORS,
        name="operators",
        tier=NO_TIER,
        is_suspended=False,
        version=row["version"],
        salt=row["scram_salt"],
        iterations=row["scram_iterations"],
        keys=tuple(KeyVerifier(*key) for key in row["keys"]),
    )


class OperatorKeys(Sessions):
    """The keys of the console. `actor` names in the audit who did it."""

    async def fetch_operator_scram(self) -> tuple[bytes, int]:
        """Return salt and iteration count for the verifiers of the keys."""
        async with self._session() as session:
            row = await session.fetchrow(
                "SELECT scram_salt, scram_iterations FROM platform.operators"
            )
        return row["scram_salt"], row["scram_iterations"]

    async def list_operator_keys(self) -> list[ApiKey]:
        """Return all keys, revoked ones too, oldest first."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT id, name, prefix, created_at, last_used_at, revoked_at "
                "FROM platform.operator_keys ORDER BY created_at, id"
            )
        return [ApiKey(**row) for row in rows]

    async def create_operator_key(
        self,
        name: str,
        stored_key: bytes,
        server_key: bytes,
        prefix: str,
        *,
        actor: str,
    ) -> UUID:
        """Add a key by its verifier; `prefix` is the part that may be shown."""
        async with self._transaction() as session:
            key_id: UUID = await session.fetchval(
                "INSERT INTO platform.operator_keys "
                "(name, stored_key, server_key, prefix) VALUES ($1, $2, $3, $4) "
                "RETURNING id",
                *(name, stored_key, server_key, prefix),
            )
            await record_event(
                session, actor, "operator_key.create", None, key=str(key_id), name=name
            )
        return key_id

    async def revoke_operator_key(self, key_id: UUID, *, actor: str) -> None:
        """End a key and the consoles it opened. Raises OperationRefused."""
        async with self._transaction() as session:
            name = await session.fetchval(
                "UPDATE platform.operator_keys SET revoked_at = now() "
                "WHERE id = $1 AND revoked_at IS NULL RETURNING name",
                key_id,
            )
            if name is None:
                raise OperationRefused(f"there is no live operator key {key_id}")
            await record_event(
                session, actor, "operator_key.revoke", None, key=str(key_id), name=name
            )
