"""Every setting: name, type, default, bounds, description.

One tree of frozen sections. `Config.load` merges defaults, a TOML file and the
environment; unknown names and values out of range fail with the path of the
field. Each part of the engine receives its own section and never sees the rest.
The sample file and docs/configuration.md are printed from this tree.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)

from ogelproxy.errors import ConfigInvalid

#: A string whose repr and str are stars; `get_secret_value()` tells it.
Secret = SecretStr

PREFIX = "OGELPROXY_"

#: Processes of one machine.
MAX_WORKERS = 256

#: Well-known environment names and the setting each one sets.
WELL_KNOWN = {
    "DATABASE_URL": "control.database_url",
    "REDIS_URL": "redis.url",
    "MONGODB_URL": "usage.mongodb_url",
    "JWT_SECRET": "auth.jwt_secret",
    "JWKS_URL": "auth.jwks_url",
    "O7S_PORT": "listen.port",
    "O7S_LOG_LEVEL": "log.level",
    "O7S_SECRET_KEY": "control.secret_key",
    "PORT": "admin.port",
}


def _split(value: Any) -> Any:
    """Read a list as the environment holds it, separated by commas."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_split)]


def _plain(value: Any) -> str:
    """Return what JSON doesn't know as the text that it is read from."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Listen(Section):
    """Where clients connect, and what they may cost before they log in."""

    host: str = Field("127.0.0.1", description="Address to listen on; `::` for all.")
    port: int = Field(5432, ge=0, le=65535, description="Port; 0 picks a free one.")
    backlog: int = Field(
        1024, ge=1, le=65535, description="Length of the accept queue."
    )
    max_clients: int = Field(
        20_000, ge=1, le=1_000_000, description="Client connections of one process."
    )
    max_logins: int = Field(
        2_000, ge=1, le=100_000, description="Clients that may be logging in at once."
    )
    login_timeout: float = Field(
        15.0, gt=0, le=600, description="Seconds from accept to ready."
    )
    proxy_protocol: Networks = Field(
        (),
        description="Networks of load balancers, which must begin every connection "
        "with a PROXY protocol header, version 1 or 2; nobody else may.",
    )


class Tls(Section):
    """TLS towards clients."""

    cert: Path | None = Field(None, description="PEM file with the certificate chain.")
    key: Path | None = Field(None, description="PEM file with the private key.")
    is_required: bool = Field(
        False, description="Refuse clients without TLS, except from loopback."
    )
    client_ca: Path | None = Field(
        None, description="PEM file with the authorities that sign client certificates."
    )
    client_certificates: Literal["off", "allow", "require"] = Field(
        "off",
        description="Whether a client may or must show a certificate that names its "
        "organisation, beside its key or token.",
    )


class Auth(Section):
    """Who is asking."""

    jwt_secret: Secret | None = Field(
        None, description="Shared secret of HS256 tokens; without it they are refused."
    )
    jwks_url: str | None = Field(
        None, description="Key set for RS256 and ES256 tokens."
    )
    jwt_audience: str | None = Field(
        None, description="Required `aud` of a token; any when unset."
    )
    jwt_leeway: float = Field(
        5.0, ge=0, le=300, description="Seconds of clock difference forgiven."
    )
    max_failures: int = Field(
        10, ge=1, le=10_000, description="Failed logins per organisation and source."
    )
    failure_interval: float = Field(
        60.0, gt=0, le=86_400, description="Seconds in which the failures are counted."
    )


class Control(Section):
    """The control plane's Postgres."""

    database_url: Secret | None = Field(
        None, description="Connection string of the control plane's Postgres."
    )
    secret_key: Secret | None = Field(
        None,
        description="Keys that encrypt credentials at rest, comma-separated: the first "
        "encrypts, all decrypt.",
    )
    max_connections: int = Field(
        4, ge=1, le=100, description="Connections to the control plane."
    )
    reconcile_interval: float = Field(
        30.0, gt=0, le=3600, description="Seconds between full comparisons."
    )
    negative_ttl: float = Field(
        2.0, ge=0, le=300, description="Seconds an unknown organisation is remembered."
    )
    stale_ttl: float = Field(
        3600.0,
        ge=0,
        le=604_800,
        description="Seconds that known records serve without the control plane.",
    )
    max_tenants: int = Field(
        100_000, ge=1, le=10_000_000, description="Tenant records kept in memory."
    )


class Redis(Section):
    """The meeting point of workers and machines."""

    url: Secret | None = Field(
        None, description="Redis or Valkey; unset for one process."
    )
    timeout: float = Field(
        1.0, ge=0.05, le=30, description="Seconds that one answer may take."
    )


class Pool(Section):
    """Server connections: how many, how long, how reset."""

    max_servers: int = Field(
        20, ge=1, le=10_000, description="Server connections per database and pool."
    )
    max_servers_per_address: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Server connections to one host and port, of all organisations "
        "with databases there; 0 for any number.",
    )
    max_prepared_statements: int = Field(
        200, ge=1, le=10_000, description="Statements kept prepared on one server."
    )
    max_prepared_bytes: int = Field(
        4_194_304, ge=4096, description="Bytes of statement text kept per pool."
    )
    connect_timeout: float = Field(
        10.0, gt=0, le=600, description="Seconds to connect and log in to a server."
    )
    queue_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds a client waits for a server."
    )
    notice_after: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="Seconds of that wait after which it is told so; 0 never.",
    )
    server_idle_timeout: float = Field(
        600.0, ge=0, description="Seconds until an unused server is closed; 0 never."
    )
    server_lifetime: float = Field(
        3600.0, ge=0, description="Seconds after which a server is replaced; 0 never."
    )
    reset_query: str = Field(
        "DISCARD ALL", description="Sent before a server goes to another client."
    )


class Client(Section):
    """What a logged-in client may take its time with; 0 is without limit."""

    idle_timeout: float = Field(0.0, ge=0, description="Seconds without a query.")
    idle_in_transaction_timeout: float = Field(
        0.0, ge=0, description="Seconds without a query inside a transaction."
    )
    query_timeout: float = Field(0.0, ge=0, description="Seconds for one query.")
    max_notifications: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Notifications kept for a client in a transaction or not reading.",
    )
    max_notification_bytes: int = Field(
        1_048_576, ge=8192, description="Bytes that they may take."
    )


class Limits(Section):
    """The query limiter."""

    transaction_wait: float = Field(
        5.0,
        ge=0,
        le=300,
        description="Seconds a query inside an open transaction waits for a token.",
    )
    floor: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of each limit that needs no Redis; 0 refuses without it.",
    )
    max_hosts: int = Field(
        16, ge=1, le=64, description="Processes that this share is split among."
    )


class Usage(Section):
    """What is billed."""

    spool_dir: Path = Field(Path("spool"), description="Directory of the usage spool.")
    batch_interval: float = Field(
        10.0, gt=0, le=3600, description="Seconds after which a batch is closed."
    )
    sync_interval: float = Field(
        1.0, gt=0, le=60, description="Seconds between writes of the open batch."
    )
    max_rows: int = Field(
        16_384, ge=256, le=1_048_576, description="Distinct rows of one batch."
    )
    max_spool_bytes: int = Field(
        1_073_741_824,
        ge=16_777_216,
        description="Disk space for a process's batches.",
    )
    history_days: int = Field(
        30,
        ge=1,
        le=3650,
        description="Days that the usage history and analytics events are kept.",
    )
    mongodb_url: Secret | None = Field(
        None,
        description="MongoDB for history and events; the control plane when unset.",
    )


class Admin(Section):
    """The operators' HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int | None = Field(
        None, ge=0, le=65535, description="Port; 0 picks a free one, unset is off."
    )


class Log(Section):
    """Logging; only the command line reads it."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is written."
    )
    format: Literal["text", "json"] = Field("text", description="Form of a line.")


class Config(Section):
    """All settings of one Engine."""

    listen: Listen = Listen()
    tls: Tls = Tls()
    auth: Auth = Auth()
    control: Control = Control()
    redis: Redis = Redis()
    pool: Pool = Pool()
    client: Client = Client()
    limits: Limits = Limits()
    usage: Usage = Usage()
    admin: Admin = Admin()
    log: Log = Log()
    workers: int = Field(
        1,
        ge=1,
        le=MAX_WORKERS,
        description="Processes that share the port; more than one need redis.url.",
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=3600, description="Seconds that transactions get to finish in."
    )

    def dump(self) -> bytes:
        """Return the settings as JSON for `restore`, secrets in clear."""
        return orjson.dumps(self.model_dump(), default=_plain)

    @classmethod
    def restore(cls, dumped: bytes | str) -> Self:
        """Return the settings that were dumped."""
        return cls.model_validate(orjson.loads(dumped))

    @classmethod
    def load(cls, path: Path | None, environ: Mapping[str, str]) -> Self:
        """Merge the defaults, the TOML file at `path` and `environ`.

        Raises ConfigInvalid naming each setting that is unknown or wrong.
        """
        tree: dict[str, Any] = {}
        if path is not None:
            try:
                tree = tomllib.loads(path.read_text())
            except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigInvalid(f"{path}: {error}") from error
        for setting, value in cls._from_environment(environ):
            node = tree
            *sections, name = setting.split(".")
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            lines = (
                f"{'.'.join(map(str, part['loc']))}: {part['msg']}"
                for part in error.errors(include_input=False, include_url=False)
            )
            raise ConfigInvalid("; ".join(lines)) from None

    @classmethod
    def _from_environment(cls, environ: Mapping[str, str]) -> list[tuple[str, str]]:
        found = [
            (setting, environ[name])
            for name, setting in WELL_KNOWN.items()
            if environ.get(name)
        ]
        names = {
            PREFIX + setting.replace(".", "_").upper(): setting
            for setting in cls.settings()
        }
        # Names for the test suite and the embedded stack share the prefix.
        reserved = ("TEST_", "PG_BIN", "VALKEY_BIN", "DEBUG", "SANITIZE")
        for name, value in environ.items():
            if name in names:
                found.append((names[name], value))
            elif name.startswith(PREFIX) and not name.startswith(
                tuple(PREFIX + word for word in reserved)
            ):
                raise ConfigInvalid(f"{name}: no such setting")
        return found

    @classmethod
    def settings(cls) -> list[str]:
        """Return the dotted names of all settings."""
        names = []
        for name, field in cls.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                names += [f"{name}.{part}" for part in inner.model_fields]
            else:
                names.append(name)
        return names
