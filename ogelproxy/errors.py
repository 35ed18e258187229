"""Every refusal and fault, each with a SQLSTATE, a kind and two texts.

``str(error)`` is for the log and may name addresses; ``client_text`` is fixed
wording plus safe fields, and is all that a client ever sees. How an error is
put on the wire is `protocol.messages.error_response`; who raises it is not
known here.

    OgelError
    ├── CredentialRejected   TokenRequiresTLS   TLSRequired   LoginThrottled
    ├── LoginTimeout         TenantSuspended     CertificateRejected
    ├── DatabaseUnknown      DatabaseDisabled
    ├── TooManyConnections   ServerBusy
    ├── RateLimited          TooManyInFlight     QueryTooLarge
    ├── PoolTimeout          ServerLost
    ├── TargetUnreachable    (CircuitOpen, TargetFull)
    ├── IdleTimeout          QueryTimeout        Draining
    ├── ListenerLost         TooManyNotifications
    ├── ProtocolViolation    NotSupported        FeatureNotIncluded
    ├── ControlUnavailable   OperationRefused    SecretUnreadable
    ├── HistoryUnavailable
    ├── ConfigInvalid        EmbeddedFailed      SpoolUnusable
    └── LineFailed           WorkerFailed        InternalError
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

NOTHING: Mapping[str, str] = MappingProxyType({})


class OgelError(Exception):
    """The root of every error that ogelproxy raises on purpose.

    Class attributes: ``code``, the stable name that docs and metrics use;
    ``sqlstate``, five characters (Postgres manual, appendix A); ``kind``, one
    of client, auth, limit, tenant, pool, server, backend, control, internal;
    ``is_fatal``, whether the connection ends.
    """

    code: ClassVar[str] = "internal_error"
    sqlstate: ClassVar[str] = "XX000"
    kind: ClassVar[str] = "internal"
    is_fatal: ClassVar[bool] = True
    client_text: str = "internal error"

    def __init__(self, log_text: str = "", *, detail: str = "", hint: str = "") -> None:
        super().__init__(log_text or self.client_text)
        self.detail = detail
        self.hint = hint

    @property
    def severity(self) -> str:
        return "FATAL" if self.is_fatal else "ERROR"


class CredentialRejected(OgelError):
    """A wrong key, an unknown organisation, a bad token: all worded alike."""

    code = "credential_rejected"
    sqlstate = "28P01"
    kind = "auth"
    client_text = "password authentication failed"


class TokenRequiresTLS(OgelError):
    """A token would have crossed the network in clear."""

    code = "token_requires_tls"
    sqlstate = "28000"
    kind = "auth"
    client_text = "token login needs TLS: connect with sslmode=require"


class TLSRequired(OgelError):
    """The proxy is set to take clients with TLS only."""

    code = "tls_required"
    sqlstate = "28000"
    kind = "auth"
    client_text = "connections need TLS: connect with sslmode=require"


class CertificateRejected(OgelError):
    """A client showed no certificate where it must, or another organisation's."""

    code = "certificate_rejected"
    sqlstate = "28000"
    kind = "auth"
    client_text = "connections need a client certificate that names the organisation"


class LoginThrottled(OgelError):
    """Too many failed logins from this source for this organisation."""

    code = "login_throttled"
    sqlstate = "28000"
    kind = "auth"
    client_text = "too many failed logins from your network, try again later"


class LoginTimeout(OgelError):
    """The client took too long to log in."""

    code = "login_timeout"
    sqlstate = "08P01"
    kind = "client"
    client_text = "login took too long"


class TenantSuspended(OgelError):
    """The organisation was suspended by an operator."""

    code = "tenant_suspended"
    sqlstate = "57P04"
    kind = "tenant"
    client_text = "organisation is suspended"


class DatabaseUnknown(OgelError):
    """The organisation has no active database of this name."""

    code = "database_unknown"
    sqlstate = "3D000"
    kind = "tenant"

    def __init__(self, name: str) -> None:
        self.client_text = f'database "{name}" does not exist'
        super().__init__()


class DatabaseDisabled(OgelError):
    """An operator has new connections to this database refused for now."""

    code = "database_disabled"
    sqlstate = "57P03"
    kind = "tenant"

    def __init__(self, name: str) -> None:
        self.client_text = f'database "{name}" does not accept connections now'
        super().__init__()


class TooManyConnections(OgelError):
    """The gate is closed: the tier's maximum of connections is reached."""

    code = "too_many_connections"
    sqlstate = "53300"
    kind = "limit"
    client_text = "connection limit exceeded"


class ServerBusy(OgelError):
    """The proxy itself holds as many clients as it may."""

    code = "proxy_full"
    sqlstate = "53300"
    kind = "limit"
    client_text = "the proxy accepts no more connections"


class RateLimited(OgelError):
    """The bucket had no token and waiting was not allowed or not enough."""

    code = "rate_limited"
    sqlstate = "53400"
    kind = "limit"
    is_fatal = False
    client_text = "query rate limit exceeded"


class QueryTooLarge(OgelError):
    """A message that has to be seen whole is larger than its limit."""

    code = "query_too_large"
    sqlstate = "54000"
    kind = "limit"
    client_text = "message is too large"


class TooManyInFlight(OgelError):
    """The organisation had its maximum of queries under way for too long."""

    code = "too_many_in_flight"
    sqlstate = "53400"
    kind = "limit"
    is_fatal = False

    def __init__(self, seconds: float, *, detail: str = "", hint: str = "") -> None:
        self.client_text = f"too many queries in flight, waited {seconds:.1f} s"
        super().__init__(detail=detail, hint=hint)


class PoolTimeout(OgelError):
    """No server connection came free in time."""

    code = "pool_timeout"
    sqlstate = "53300"
    kind = "pool"
    is_fatal = False

    def __init__(self, seconds: float) -> None:
        self.client_text = f"no server connection free after {seconds:.1f} s"
        super().__init__()


class TargetUnreachable(OgelError):
    """The database behind the proxy can't be reached or refused our login.

    `said` holds the fields of the error that it refused with, if it did.
    """

    code = "target_unreachable"
    sqlstate = "08006"
    kind = "backend"
    client_text = "the database can't be reached"

    def __init__(
        self, log_text: str = "", *, hint: str = "", said: Mapping[str, str] = NOTHING
    ) -> None:
        self.said = said
        super().__init__(log_text, hint=hint)


class CircuitOpen(TargetUnreachable):
    """Attempts failed, the last one for `cause`, so that none is made for a while."""

    code = "circuit_open"

    def __init__(self, seconds: float, cause: TargetUnreachable) -> None:
        self.sqlstate = cause.sqlstate  # type: ignore[misc]
        self.client_text = cause.client_text
        super().__init__(
            f"not tried: the circuit is open for {seconds:.1f} s",
            hint=f"retry after {seconds:.1f} s",
        )


class TargetFull(TargetUnreachable):
    """The database is there and takes no more connections."""

    code = "target_full"
    sqlstate = "53300"
    client_text = "the database accepts no more connections"


class ServerLost(OgelError):
    """The server connection ended while it served this client."""

    code = "server_lost"
    sqlstate = "08006"
    kind = "server"
    client_text = "the connection to the database was lost"


class SessionLost(OgelError):
    """A client's settings could not be given to the server that was to serve it."""

    code = "session_lost"
    sqlstate = "08006"
    kind = "server"
    client_text = "the session's settings can't be restored"


class IdleTimeout(OgelError):
    """The client was idle for longer than it may be."""

    code = "idle_timeout"
    sqlstate = "57P05"
    kind = "client"
    client_text = "terminating connection due to idle timeout"


class IdleInTransactionTimeout(OgelError):
    """The client left a transaction open for longer than it may."""

    code = "idle_in_transaction_timeout"
    sqlstate = "25P03"
    kind = "client"
    client_text = "terminating connection due to idle-in-transaction timeout"


class QueryTimeout(OgelError):
    """A query ran for longer than it may."""

    code = "query_timeout"
    sqlstate = "57014"
    kind = "client"
    client_text = "terminating connection due to query timeout"


class Draining(OgelError):
    """The proxy is going away."""

    code = "draining"
    sqlstate = "57P01"
    kind = "control"
    client_text = "terminating connection due to administrator command"


class ListenerLost(OgelError):
    """The connection that a client's notifications come by was lost.

    Some may have been missed, so that the client has to come again and look.
    """

    code = "listener_lost"
    sqlstate = "57P01"
    kind = "server"
    client_text = "terminating connection: notifications may have been lost"


class TooManyNotifications(OgelError):
    """A client in a transaction, or that doesn't read, is owed too many."""

    code = "too_many_notifications"
    sqlstate = "53400"
    kind = "limit"
    client_text = "terminating connection: too many notifications wait for it"


class ProtocolViolation(OgelError):
    """Bytes that are not the Postgres protocol; `by` says whose fault it was."""

    code = "protocol_violation"
    sqlstate = "08P01"
    kind = "client"

    def __init__(self, text: str, *, by: str = "client") -> None:
        self.by = by
        self.client_text = f"protocol violation: {text}"
        super().__init__(f"{text} (from the {by})")


class NotSupported(OgelError):
    """Something that this database type or mode can't do, named."""

    code = "not_supported"
    sqlstate = "0A000"
    kind = "client"

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.client_text = f"{what} is not supported"
        super().__init__(hint=hint)


class FeatureNotIncluded(OgelError):
    """The organisation's tier doesn't have what was asked for."""

    code = "feature_not_included"
    sqlstate = "42501"
    kind = "tenant"

    def __init__(self, feature: str, tier: str) -> None:
        self.client_text = f"{feature} is not included in tier {tier}"
        super().__init__(hint="upgrade to a tier that has it")


class ControlUnavailable(OgelError):
    """Neither memory nor the control plane could say who this is."""

    code = "control_unavailable"
    sqlstate = "57P03"
    kind = "control"
    client_text = "the proxy can't look up your organisation now, try again"


class RedisUnavailable(OgelError):
    """Redis did not answer, or refused; what was asked of it may have been done."""

    code = "redis_unavailable"
    sqlstate = "57P03"
    kind = "control"
    client_text = "the proxy can't check your limits now, try again"


class HistoryUnavailable(OgelError):
    """MongoDB, where history and events are kept, can't be reached or refuses."""

    code = "history_unavailable"
    sqlstate = "57P03"
    kind = "control"
    client_text = "the usage history can't be reached now, try again"


class OperationRefused(OgelError):
    """What an operator asked for is unknown, exists already or is not allowed."""

    code = "operation_refused"
    sqlstate = "22023"
    kind = "control"
    is_fatal = False

    def __init__(self, text: str) -> None:
        self.client_text = text
        super().__init__()


class SecretUnreadable(OgelError):
    """None of the configured keys decrypts a stored connection string."""

    code = "secret_unreadable"
    sqlstate = "58000"
    kind = "control"
    client_text = "a stored connection string can't be decrypted"


class ConfigInvalid(OgelError):
    """A setting is unknown, malformed or out of range."""

    code = "config_invalid"
    sqlstate = "F0000"
    kind = "internal"
    client_text = "invalid configuration"


class EmbeddedFailed(OgelError):
    """A part of the embedded stack can't be found, started or used."""

    code = "embedded_failed"
    sqlstate = "58000"
    kind = "internal"
    client_text = "the embedded stack failed"


class SpoolUnusable(OgelError):
    """The usage spool's directory, or a file in it, can't be used as it is."""

    code = "spool_unusable"
    sqlstate = "58030"
    kind = "internal"
    client_text = "usage can't be recorded"


class LineFailed(OgelError):
    """Another process of this machine didn't answer, or couldn't be asked."""

    code = "line_failed"
    kind = "internal"
    client_text = "the proxy's processes can't reach each other"


class WorkerFailed(OgelError):
    """A worker process did not start; the text is its own."""

    code = "worker_failed"
    kind = "internal"
    client_text = "a worker did not start"


class InternalError(OgelError):
    """A defect of ours; the client gets an id that the log repeats."""

    code = "internal_error"

    def __init__(self, log_text: str) -> None:
        self.id = secrets.token_hex(4)
        self.client_text = f"internal error {self.id}"
        super().__init__(f"{self.id}: {log_text}")
