"""The values of the control plane: Tenant, Tier, KeyVerifier, Target.

Frozen, and free of I/O: `store` makes them from rows, `directory` keeps them,
the layers only read them. A change in the control plane makes new values with
a higher `version`; nothing here is ever changed in place. The last four are
what operators list.
"""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from ogelproxy.config import Secret

#: Seconds of its rate that a tier's bucket may save up (spec: 1 s, or 5 s).
BURST_SECONDS = 5.0
STEADY_SECONDS = 1.0

#: The handle of an organisation; `fullmatch` it.
HANDLE = re.compile(r"org_[a-z0-9_]{1,56}")
#: The handle of the operators' record, which no organisation can have.
OPERATORS = "ogel"


#: The feature of a tier that lets replication connections pass.
REPLICATION = "replication"


class DatabaseType(enum.StrEnum):
    POSTGRES = "postgres"
    NEON = "neon"
    CONVEX = "convex"
    REDIS = "redis"
    MONGODB = "mongodb"


class PoolMode(enum.StrEnum):
    SESSION = "session"
    TRANSACTION = "transaction"
    STATEMENT = "statement"
    AUTO = "auto"


class LimiterMode(enum.StrEnum):
    ENFORCE = "enforce"
    WARN = "warn"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Tier:
    """One row of ``platform.tier_limits``: what a plan allows and costs.

    ``None`` means without limit (`max_databases`, `max_in_flight`) or not for
    sale (the two overage prices).
    """

    name: str
    max_connections: int
    max_queries_per_second: float
    max_storage_gb: float
    may_burst: bool
    monthly_fee: float
    included_vcpu_hours: float
    included_memory_gb_hours: float
    overage_vcpu_hour: float | None
    overage_gb_hour: float | None
    max_databases: int | None
    features: tuple[str, ...] = ()
    statement_timeout: float = 0.0  # seconds; 0 is without limit
    idle_in_transaction_timeout: float = 0.0  # seconds; 0 is without limit
    work_mem_kb: int = 4096
    weight: int = 1  # share of server connections, where they are short
    max_in_flight: int | None = None  # clients with a query or transaction under way

    @property
    def bucket_capacity(self) -> float:
        """Tokens that the tier's bucket holds when full."""
        seconds = BURST_SECONDS if self.may_burst else STEADY_SECONDS
        return self.max_queries_per_second * seconds


@dataclass(frozen=True, slots=True)
class KeyVerifier:
    """What is kept of an API key: enough to check it, not to use it (RFC 5803)."""

    id: UUID
    name: str
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Target:
    """One database of a tenant: where it is and how to log in there."""

    id: UUID
    name: str  # the database name in the tenant's URL
    type: DatabaseType
    pool_mode: PoolMode
    dsn: Secret  # the connection string, decrypted


@dataclass(frozen=True, slots=True)
class Tenant:
    """An organisation as the layers see it."""

    id: UUID
    handle: str
    name: str
    tier: Tier
    is_suspended: bool
    version: int  # grows with every change in the control plane
    salt: bytes = field(repr=False)  # SCRAM salt that all its keys share
    iterations: int = 4096  # SCRAM iteration count that all its keys share
    keys: tuple[KeyVerifier, ...] = ()
    databases: Mapping[str, Target] = field(default_factory=dict)
    limiter_mode: LimiterMode = LimiterMode.ENFORCE
    max_wait: float = 0.0  # seconds that a query may wait for a token
    connections_override: int | None = None

    @property
    def max_connections(self) -> int:
        """Connections it may hold open: its own number, else its tier's."""
        if self.connections_override is not None:
            return self.connections_override
        return self.tier.max_connections


@dataclass(frozen=True, slots=True)
class Credential:
    """What a login proved: which tenant, and by which key or token."""

    handle: str
    key_id: UUID | None = None  # None when a token was used
    expires_at: float | None = None  # Unix time at which a token ends
    database: str = ""
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Organization:
    """An organisation as operators list it."""

    id: UUID
    handle: str
    name: str
    tier: str
    is_suspended: bool
    limiter_mode: LimiterMode
    max_wait: float  # seconds
    connections_override: int | None
    key_count: int  # live ones
    database_count: int  # active ones
    tier_changed_at: datetime.datetime | None
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key as operators list it; `prefix` is all that is shown of it."""

    id: UUID
    name: str
    prefix: str
    created_at: datetime.datetime
    last_used_at: datetime.datetime | None
    revoked_at: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class Database:
    """A database as operators list it, without where it is."""

    id: UUID
    name: str
    type: DatabaseType
    pool_mode: PoolMode
    is_active: bool
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class UsageDay:
    """What one organisation used of one database type on one day (UTC)."""

    handle: str  # the organisation's id once it is deleted
    day: datetime.date
    database_type: DatabaseType
    query_count: int
    rows: int
    bytes: int
    vcpu_hours: float
    memory_gb_hours: float
    storage_gb: float  # the day's maximum


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """What one program used by one statement in one database, over some time."""

    handle: str
    database: str
    database_type: DatabaseType
    application_name: str
    fingerprint: str | None  # 16 hexadecimal digits; None: not told apart
    queries: int
    refused: int  # by the limiter, not in queries
    errors: int
    rows: int
    bytes_in: int
    bytes_out: int
    server_seconds: float
    longest_seconds: float
    vcpu_hours: float
    memory_gb_hours: float
    last_at: datetime.datetime
