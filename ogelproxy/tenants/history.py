"""History: what the control plane knows of past usage, for operators to read.

It is written by `usage`'s sinks. Where MongoDB has the history, only the totals are
here. `Store` is built on it and supplies sessions.
"""

from __future__ import annotations

import datetime
from uuid import UUID

from ogelproxy.tenants.model import DatabaseType, UsageDay, UsageTotal
from ogelproxy.tenants.operations import Sessions, unknown

_USAGE = """
SELECT coalesce(o.handle, u.org_id::text) AS handle,
       (u.period_start AT TIME ZONE 'UTC')::date AS day, u.database_type,
       sum(u.query_count)::bigint AS query_count, sum(u.rows)::bigint AS rows,
       sum(u.bytes)::bigint AS bytes, sum(u.vcpu_hours) AS vcpu_hours,
       sum(u.memory_gb_hours) AS memory_gb_hours, max(u.storage_gb) AS storage_gb
FROM platform.usage_metrics u LEFT JOIN platform.organizations o ON o.id = u.org_id
WHERE u.period_start >= $1 AND u.period_start < $2
  AND ($3::uuid IS NULL OR u.org_id = $3)
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""

_HISTORY = """
SELECT handle, database, database_type, application_name,
       CASE WHEN fingerprint <> 0 THEN lpad(to_hex(fingerprint), 16, '0') END
           AS fingerprint,
       sum(queries)::bigint AS queries, sum(refused)::bigint AS refused,
       sum(errors)::bigint AS errors, sum(rows)::bigint AS rows,
       sum(bytes_in)::bigint AS bytes_in, sum(bytes_out)::bigint AS bytes_out,
       sum(server_seconds) AS server_seconds, max(longest_seconds) AS longest_seconds,
       sum(vcpu_seconds) / 3600 AS vcpu_hours,
       sum(memory_gib_seconds) / 3600 AS memory_gb_hours, max(last_at) AS last_at
FROM platform.usage_history
WHERE first_at >= $1 AND first_at < $2 AND ($3::uuid IS NULL OR org_id = $3)
GROUP BY 1, 2, 3, 4, 5
ORDER BY server_seconds DESC, 1, 2, 3, 4, 5 NULLS FIRST LIMIT $4
"""


class History(Sessions):
    """What was used; methods raise OperationRefused for an unknown organisation."""

    async def fetch_usage(
        self, handle: str | None, since: datetime.datetime, until: datetime.datetime
    ) -> list[UsageDay]:
        """Return usage per organisation, day and type; of all when `handle` is None.

        Counted are the periods that start in [since, until).
        """
        org_id = await self.find_id(handle)
        async with self._session() as session:
            rows = await session.fetch(_USAGE, since, until, org_id)
        return [
            UsageDay(**{**row, "database_type": DatabaseType(row["database_type"])})
            for row in rows
        ]

    async def fetch_history(
        self,
        org_id: UUID | None,
        since: datetime.datetime,
        until: datetime.datetime,
        limit: int,
    ) -> list[UsageTotal]:
        """Sum the history by database, application and statement, the costliest first.

        Of all organisations when `org_id` is None; rows that began in
        [since, until).
        """
        async with self._session() as session:
            rows = await session.fetch(_HISTORY, since, until, org_id, limit)
        return [
            UsageTotal(**{**row, "database_type": DatabaseType(row["database_type"])})
            for row in rows
        ]

    async def find_id(self, handle: str | None) -> UUID | None:
        """Return the organisation's id; None, which is all of them, for None."""
        if handle is None:
            return None
        async with self._session() as session:
            org_id: UUID | None = await session.fetchval(
                "SELECT id FROM platform.organizations WHERE handle = $1", handle
            )
        if org_id is None:
            raise unknown(handle)
        return org_id
