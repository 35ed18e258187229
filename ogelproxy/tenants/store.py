"""Store: the control plane's Postgres, and the only file that knows asyncpg.

Owns connections, migrations, the reads that make Tenants from rows of the schema
``platform``, and the listening for changes. What operators do is in `operations`,
remembering is in `directory`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

import asyncpg

from ogelproxy.config import Control
from ogelproxy.errors import (
    ConfigInvalid,
    ControlUnavailable,
    OperationRefused,
    SecretUnreadable,
)
from ogelproxy.tenants import schema
from ogelproxy.tenants.history import History
from ogelproxy.tenants.model import (
    OPERATORS,
    DatabaseType,
    KeyVerifier,
    LimiterMode,
    PoolMode,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.tenants.operations import Operations
from ogelproxy.tenants.operators import OperatorKeys, fetch_operators
from ogelproxy.tenants.vault import Vault
from ogelproxy.tenants.vitals import VitalSigns

if TYPE_CHECKING:
    # Generic in the stubs only.
    from asyncpg.pool import PoolConnectionProxy

    Pool = asyncpg.Pool[asyncpg.Record]
    PooledSession = PoolConnectionProxy[asyncpg.Record]
    BaseConnection = asyncpg.Connection[asyncpg.Record]
else:
    BaseConnection = asyncpg.Connection


class Row(Protocol):
    """A row by the names of its columns."""

    def __getitem__(self, column: str, /) -> Any: ...


logger = logging.getLogger(__name__)

CHANNEL = "platform_changes"
CONNECT_TIMEOUT = 5.0  # seconds
READ_TIMEOUT = 5.0  # seconds, the wait for a connection of the pool included
WRITE_TIMEOUT = 30.0  # seconds; a tier's change touches all its organisations
#: Seconds between questions on the listening connection: a peer that vanished
#: without a word is noticed after one of these and a READ_TIMEOUT.
HEARTBEAT_INTERVAL = 10.0
MIN_RETRY_INTERVAL = 0.1  # seconds
MAX_RETRY_INTERVAL = 5.0  # seconds
#: Names the advisory lock under which instances migrate one after another.
MIGRATION_LOCK = 0x6F67_656C_7072_6F78

_TENANTS = """
SELECT o.id, o.handle, o.name AS org_name, o.status, o.version, o.limiter_mode,
       o.max_wait_ms, o.connections_override, o.scram_salt, o.scram_iterations, t.*,
       ARRAY(SELECT ROW(k.id, k.name, k.stored_key, k.server_key)
             FROM platform.api_keys k
             WHERE k.org_id = o.id AND k.revoked_at IS NULL
             ORDER BY k.created_at, k.id) AS keys,
       ARRAY(SELECT ROW(d.id, d.name, d.database_type, d.pool_mode,
                        d.connection_string)
             FROM platform.database_credentials d
             WHERE d.org_id = o.id AND d.is_active ORDER BY d.name) AS databases
FROM platform.organizations o JOIN platform.tier_limits t ON t.name = o.tier
WHERE o.handle = ANY($1)
"""

#: How the control plane is away: nothing of it is the asker's fault.
_FAILURES = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class _Connection(BaseConnection):
    """A connection of the pool: nothing that we run leaves session state.

    So the query that asyncpg sends to reset it would only double the round trips;
    an open transaction is rolled back all the same.
    """

    def get_reset_query(self) -> str:
        return ""


class Store(Operations, OperatorKeys, History, VitalSigns):
    """The control plane's Postgres: open before use, close at the end.

    Without a vault it can do everything but read and write connection strings.
    Every method raises ControlUnavailable when Postgres can't be reached or gives
    no answer in time, and ConfigInvalid when the database's URL is malformed.
    """

    def __init__(self, config: Control, vault: Vault | None) -> None:
        self._config = config
        self._given_vault = vault
        self._pool: Pool | None = None  # set by open, cleared by close

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Make the pool, without connecting: a proxy may start before its Postgres.

        Raises ConfigInvalid when the database's URL is missing.
        """
        self._pool = await asyncpg.create_pool(
            self._dsn(),
            min_size=0,
            max_size=self._config.max_connections,
            connect=_connect,
            connection_class=_Connection,
            server_settings={"application_name": "ogelproxy"},
        )

    async def close(self) -> None:
        """Close the pool's connections, by force after READ_TIMEOUT."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    @property
    def pool(self) -> Pool:
        """The pool, for others that write to the control plane (usage)."""
        if self._pool is None:
            raise ControlUnavailable("the store is not open")
        return self._pool

    @property
    def _vault(self) -> Vault:
        if self._given_vault is None:
            raise ConfigInvalid("control.secret_key (O7S_SECRET_KEY) is not set")
        return self._given_vault

    def _dsn(self) -> str:
        if self._config.database_url is None:
            raise ConfigInvalid("control.database_url (DATABASE_URL) is not set")
        return self._config.database_url.get_secret_value()

    async def migrate(self) -> None:
        """Bring the schema up to date; instances that start together take turns."""
        async with self._transaction(limit=None) as session:
            await session.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
            # IF NOT EXISTS would ask for the right to create what is there already.
            if not await session.fetchval(
                "SELECT to_regclass('platform.migrations') IS NOT NULL"
            ):
                if not await session.fetchval(
                    "SELECT to_regnamespace('platform') IS NOT NULL"
                ):
                    await session.execute("CREATE SCHEMA platform")
                await session.execute(
                    "CREATE TABLE platform.migrations (name text PRIMARY KEY, "
                    "applied_at timestamptz NOT NULL DEFAULT now())"
                )
            rows = await session.fetch("SELECT name FROM platform.migrations")
            applied = {row["name"] for row in rows}
            for name, script in schema.scripts():
                if name not in applied:
                    await session.execute(script)
                    await session.execute(
                        "INSERT INTO platform.migrations (name) VALUES ($1)", name
                    )
                    logger.info("migrated the control plane to %s", name)

    async def fetch_mock_secret(self) -> bytes:
        """Return the secret that the salts of unknown organisations are made from."""
        async with self._session() as session:
            secret: bytes = await session.fetchval(
                "SELECT value FROM platform.secrets WHERE name = 'mock_salt'"
            )
        return secret

    async def fetch_tenant(self, handle: str) -> Tenant | None:
        """Return the tenant with its tier, live keys and active databases, or None.

        One round trip, one snapshot.
        """
        return (await self.fetch_tenants([handle])).get(handle)

    async def fetch_tenants(self, handles: Collection[str]) -> dict[str, Tenant]:
        """Return those of the tenants that exist, by handle, in one round trip."""
        async with self._session() as session:
            rows = await session.fetch(_TENANTS, handles)
            found = {row["handle"]: self._tenant(row) for row in rows}
            if OPERATORS in handles and (operators := await fetch_operators(session)):
                found[OPERATORS] = operators
        return found

    async def fetch_versions(self, handles: Collection[str]) -> dict[str, int]:
        """Return the versions of those of the tenants that exist, by handle."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT handle, version FROM platform.organizations "
                "WHERE handle = ANY($1) "
                "UNION ALL SELECT $2, version FROM platform.operators "
                "WHERE $2 = ANY($1)",
                *(handles, OPERATORS),
            )
        return {row["handle"]: row["version"] for row in rows}

    async def listen(
        self, changed: Callable[[str], None], attached: Callable[[bool], None]
    ) -> NoReturn:
        """Call `changed` with the payload of every change, until cancelled.

        The connection is the method's own. `attached(True)` is called when it
        listens: what happened before is unknown and has to be compared.
        `attached(False)` is called when it is lost and after each vain attempt;
        attempts go on with exponential back-off and jitter.
        """
        dsn = self._dsn()
        retry_interval = MIN_RETRY_INTERVAL

        def attach() -> None:
            nonlocal retry_interval
            retry_interval = MIN_RETRY_INTERVAL
            attached(True)

        while True:
            try:
                await self._attend(dsn, changed, attach)
                reason = "the connection ended"
            except _FAILURES as error:
                reason = _said(error)
            logger.warning("not listening to the control plane: %s", reason)
            attached(False)
            await asyncio.sleep(retry_interval * random.uniform(0.5, 1.0))
            retry_interval = min(retry_interval * 2, MAX_RETRY_INTERVAL)

    async def _attend(
        self, dsn: str, changed: Callable[[str], None], attach: Callable[[], None]
    ) -> None:
        """Listen on one connection until it ends; raises one of _FAILURES."""
        connection = await _connect(
            dsn, server_settings={"application_name": "ogelproxy listener"}
        )
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _connection: lost.set())
            await connection.add_listener(
                CHANNEL, lambda _connection, _pid, _channel, payload: changed(payload)
            )
            attach()
            while not lost.is_set():
                try:
                    async with asyncio.timeout(HEARTBEAT_INTERVAL):
                        await lost.wait()
                except TimeoutError:
                    await connection.execute("SELECT 1", timeout=READ_TIMEOUT)
        finally:
            connection.terminate()

    async def list_tiers(self) -> list[Tier]:
        """Return all tiers, the cheapest first."""
        async with self._session() as session:
            rows = await session.fetch(
                "SELECT * FROM platform.tier_limits ORDER BY monthly_fee, name"
            )
        return [_tier(row) for row in rows]

    @asynccontextmanager
    async def _session(
        self, limit: float | None = READ_TIMEOUT
    ) -> AsyncIterator[PooledSession]:
        try:
            async with asyncio.timeout(limit), self.pool.acquire() as session:
                yield session
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
            raise OperationRefused(_refusal(error)) from None
        except asyncpg.UndefinedTableError as error:
            raise ControlUnavailable(
                "the control plane has no such table: start ogelproxy, it migrates"
            ) from error
        except _FAILURES as error:
            raise ControlUnavailable(
                f"the control plane gives no answer: {_said(error)}"
            ) from error

    @asynccontextmanager
    async def _transaction(
        self, limit: float | None = WRITE_TIMEOUT
    ) -> AsyncIterator[PooledSession]:
        async with self._session(limit) as session, session.transaction():
            yield session

    def _tenant(self, row: Row) -> Tenant:
        databases = {}
        for target_id, name, type, pool_mode, token in row["databases"]:
            try:
                databases[name] = Target(
                    id=target_id,
                    name=name,
                    type=DatabaseType(type),
                    pool_mode=PoolMode(pool_mode),
                    dsn=self._vault.decrypt(token),
                )
            except (SecretUnreadable, ValueError) as error:
                # The tenant's other databases shall work; this one is refused.
                logger.error("database %s of %s: %s", name, row["handle"], error)
        return Tenant(
            id=row["id"],
            handle=row["handle"],
            name=row["org_name"],
            tier=_tier(row),
            is_suspended=row["status"] == "suspended",
            version=row["version"],
            salt=row["scram_salt"],
            iterations=row["scram_iterations"],
            keys=tuple(KeyVerifier(*key) for key in row["keys"]),
            databases=databases,
            limiter_mode=LimiterMode(row["limiter_mode"]),
            max_wait=row["max_wait_ms"] / 1000,
            connections_override=row["connections_override"],
        )


async def _connect(*args: Any, **options: Any) -> Any:
    try:
        return await asyncpg.connect(*args, **options, timeout=CONNECT_TIMEOUT)
    except ValueError:
        # The reason could quote a part of the password.
        raise ConfigInvalid(
            "control.database_url (DATABASE_URL) is not a valid Postgres URL"
        ) from None


def _tier(row: Row) -> Tier:
    return Tier(
        name=row["name"],
        max_connections=row["max_connections"],
        max_queries_per_second=row["max_queries_per_second"],
        max_storage_gb=row["max_storage_gb"],
        may_burst=row["may_burst"],
        monthly_fee=float(row["monthly_fee"]),
        included_vcpu_hours=row["included_vcpu_hours"],
        included_memory_gb_hours=row["included_memory_gb_hours"],
        overage_vcpu_hour=_price(row["overage_vcpu_hour"]),
        overage_gb_hour=_price(row["overage_gb_hour"]),
        max_databases=row["max_databases"],
        features=tuple(row["features"]),
        statement_timeout=row["statement_timeout"],
        idle_in_transaction_timeout=row["idle_in_transaction_timeout"],
        work_mem_kb=row["work_mem_kb"],
        weight=row["weight"],
        max_in_flight=row["max_in_flight"],
    )


def _price(amount: Decimal | None) -> float | None:
    return None if amount is None else float(amount)


def _said(error: BaseException) -> str:
    """Return the error's kind and first line: the others may quote a row."""
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else "no reply in time"


def _refusal(error: asyncpg.PostgresError) -> str:
    """Return one sentence for what the schema's rules don't allow."""
    if isinstance(error, asyncpg.UniqueViolationError):
        return f"it exists already ({error.constraint_name})"
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return f"it names something that does not exist ({error.constraint_name})"
    if isinstance(error, asyncpg.IntegrityConstraintViolationError):
        rule = error.constraint_name or error.column_name
        return f"a value is out of its range ({rule})"
    return str(error).partition("\n")[0]
