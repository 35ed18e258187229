"""Vitals: what the control plane's Postgres says about itself.

`doctor` asks for them; a proxy that runs does not.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ogelproxy.errors import SecretUnreadable
from ogelproxy.tenants import schema
from ogelproxy.tenants.operations import Session, Sessions
from ogelproxy.tenants.vault import Vault

#: Of our own: running proxies are not to hear it.
CHANNEL = "ogelproxy_doctor"
NOTIFY_TIMEOUT = 2.0  # seconds
#: Credentials that are tried. All of them have the same keys, but for mistakes.
MAX_TRIED = 1000

_VITALS = """
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int / 10000 AS major,
       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool
           AS is_read_only,
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0)
           AS max_connections,
       (SELECT coalesce(sum(numbackends), 0)::int FROM pg_stat_database)
           AS used_connections,
       has_database_privilege(current_database(), 'CREATE') AS may_create,
       to_regclass('platform.migrations') IS NOT NULL AS has_schema
"""


@dataclass(frozen=True, slots=True)
class Vitals:
    """One look at the control plane's Postgres."""

    version: str
    major: int
    is_read_only: bool  # a standby, or set so
    max_connections: int  # for who is no superuser
    used_connections: int
    may_create: bool  # whether our role may make the schema
    has_schema: bool
    pending: tuple[str, ...]  # migrations that this release has and it has not
    unknown: tuple[str, ...]  # migrations of a newer release


class _Listening(Session, Protocol):
    """A session that can be told of notifications."""

    async def add_listener(
        self, channel: str, callback: Callable[..., None], /
    ) -> None: ...
    async def remove_listener(
        self, channel: str, callback: Callable[..., None], /
    ) -> None: ...


class VitalSigns(Sessions):
    """Questions about the server itself; each may raise ControlUnavailable."""

    async def fetch_vitals(self) -> Vitals:
        """Ask for all that one query tells, and for the migrations."""
        async with self._session() as session:
            row: dict[str, Any] = dict(await session.fetchrow(_VITALS))
            applied: set[str] = set()
            if row["has_schema"]:
                rows = await session.fetch("SELECT name FROM platform.migrations")
                applied = {each["name"] for each in rows}
        ours = [name for name, _ in schema.scripts()]
        return Vitals(
            **row,
            pending=tuple(name for name in ours if name not in applied),
            unknown=tuple(sorted(applied.difference(ours))),
        )

    async def fetch_time(self) -> float:
        """Return its clock as Unix time."""
        async with self._session() as session:
            time: float = await session.fetchval(
                "SELECT extract(epoch FROM clock_timestamp())::float8"
            )
        return time

    async def hears(self) -> bool:
        """Say whether one session hears what another one notifies.

        It does not behind a pooler that lends servers by the transaction.
        """
        heard = asyncio.Event()
        word = secrets.token_hex(8)

        def hear(_session: object, _pid: int, _channel: str, payload: str) -> None:
            if payload == word:
                heard.set()

        async with self._session() as lent, self._session() as speaker:
            listener = cast(_Listening, lent)
            await listener.add_listener(CHANNEL, hear)
            try:
                await speaker.execute("SELECT pg_notify($1, $2)", CHANNEL, word)
                async with asyncio.timeout(NOTIFY_TIMEOUT):
                    await heard.wait()
            except TimeoutError:
                return False
            finally:
                await listener.remove_listener(CHANNEL, hear)
        return True

    async def list_unreadable(self, vault: Vault) -> tuple[int, list[str]]:
        """Return how many credentials were tried, and those that no key decrypts."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT d.connection_string, o.handle, d.name "
                "FROM platform.database_credentials d "
                "JOIN platform.organizations o ON o.id = d.org_id "
                "WHERE d.is_active ORDER BY d.id LIMIT $1",
                MAX_TRIED,
            )
        unreadable = []
        for row in rows:
            try:
                vault.decrypt(row["connection_string"])
            except SecretUnreadable:
                unreadable.append(f"{row['handle']}/{row['name']}")
        return len(rows), unreadable
