"""ogelproxy: a multi-tenant Postgres proxy.

Read it in the order of a query's journey: listener, client, login (startup,
auth, tenants, gate), relay (limiter, router, pool, server), usage.

    async with Engine(Config.load(None, os.environ)) as engine:
        print(engine.addresses["postgres"])

The sections of Config are in `ogelproxy.config`. Importing this opens nothing
and reads no environment.
"""

from importlib.metadata import version

from ogelproxy.config import Config, Secret
from ogelproxy.engine import Engine
from ogelproxy.errors import (
    CertificateRejected,
    CircuitOpen,
    ConfigInvalid,
    ControlUnavailable,
    CredentialRejected,
    DatabaseDisabled,
    DatabaseUnknown,
    Draining,
    EmbeddedFailed,
    FeatureNotIncluded,
    HistoryUnavailable,
    IdleInTransactionTimeout,
    IdleTimeout,
    InternalError,
    LineFailed,
    ListenerLost,
    LoginThrottled,
    LoginTimeout,
    NotSupported,
    OgelError,
    OperationRefused,
    PoolTimeout,
    ProtocolViolation,
    QueryTimeout,
    QueryTooLarge,
    RateLimited,
    RedisUnavailable,
    SecretUnreadable,
    ServerBusy,
    ServerLost,
    SessionLost,
    SpoolUnusable,
    TargetFull,
    TargetUnreachable,
    TenantSuspended,
    TLSRequired,
    TokenRequiresTLS,
    TooManyConnections,
    TooManyInFlight,
    TooManyNotifications,
    WorkerFailed,
)
from ogelproxy.metrics import Metrics
from ogelproxy.tenants.directory import TenantDirectory
from ogelproxy.tenants.model import (
    Credential,
    DatabaseType,
    KeyVerifier,
    LimiterMode,
    PoolMode,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.tenants.supplied import InMemoryDirectory
from ogelproxy.usage import Batch, MemorySink, Payer, PostgresSink, Row, Sink

__version__ = version("ogelproxy")

__all__ = [
    "Batch",
    "CertificateRejected",
    "CircuitOpen",
    "Config",
    "ConfigInvalid",
    "ControlUnavailable",
    "Credential",
    "CredentialRejected",
    "DatabaseDisabled",
    "DatabaseType",
    "DatabaseUnknown",
    "Draining",
    "EmbeddedFailed",
    "Engine",
    "FeatureNotIncluded",
    "HistoryUnavailable",
    "IdleInTransactionTimeout",
    "IdleTimeout",
    "InMemoryDirectory",
    "InternalError",
    "KeyVerifier",
    "LimiterMode",
    "LineFailed",
    "ListenerLost",
    "LoginThrottled",
    "LoginTimeout",
    "MemorySink",
    "Metrics",
    "NotSupported",
    "OgelError",
    "OperationRefused",
    "Payer",
    "PoolMode",
    "PoolTimeout",
    "PostgresSink",
    "ProtocolViolation",
    "QueryTimeout",
    "QueryTooLarge",
    "RateLimited",
    "RedisUnavailable",
    "Row",
    "Secret",
    "SecretUnreadable",
    "ServerBusy",
    "ServerLost",
    "SessionLost",
    "Sink",
    "SpoolUnusable",
    "TLSRequired",
    "Target",
    "TargetFull",
    "TargetUnreachable",
    "Tenant",
    "TenantDirectory",
    "TenantSuspended",
    "Tier",
    "TokenRequiresTLS",
    "TooManyConnections",
    "TooManyInFlight",
    "TooManyNotifications",
    "WorkerFailed",
    "__version__",
]
