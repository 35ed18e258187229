"""DevStack: everything `ogelproxy dev` runs, in one process and one directory.

Owns the state directory (lock, secrets, certificate, dev.json), the embedded
Postgres, Valkey and, where it is installed, MongoDB, the demo organisations and the
Engine in front of them; started and stopped as one. Signals, arguments and what is
shown belong to `cli`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import ipaddress
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import orjson
from cryptography import x509
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ogelproxy.auth import apikey
from ogelproxy.child import Child, is_free
from ogelproxy.config import (
    Admin,
    Config,
    Control,
    Listen,
    Log,
    Pool,
    Secret,
    Tls,
    Usage,
)
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.demo import ORGANIZATIONS, DemoOrganization, Seeder
from ogelproxy.embedded import EmbeddedPostgres
from ogelproxy.embedded_mongodb import EmbeddedMongo, is_installed
from ogelproxy.embedded_valkey import EmbeddedValkey
from ogelproxy.engine import Engine
from ogelproxy.errors import ConfigInvalid, EmbeddedFailed
from ogelproxy.redis import Redis
from ogelproxy.supervisor import Supervisor
from ogelproxy.tenants.model import OPERATORS

HOST = "127.0.0.1"
#: What a person sees between the lines that are printed.
LOG = Log(level="warning")
#: The control plane's database on the embedded Postgres.
CONTROL_DATABASE = "platform"
#: The history's database on the embedded MongoDB.
MONGODB = "ogelproxy"
#: A load run in session mode needs as many servers as it has clients.
MAX_SERVERS = 100
#: Room for the pools of all demo databases.
POSTGRES_SETTINGS = {"max_connections": "800"}
CERTIFICATE_LIFETIME = datetime.timedelta(days=365)
CERTIFICATE_RENEWAL = datetime.timedelta(days=30)

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DevOptions:
    """What the command line may choose."""

    state: Path
    port: int = 5432
    admin_port: int = 8080
    has_tls: bool = False
    workers: int = 1


@dataclass(frozen=True, slots=True)
class DemoDatabase:
    """A URL to paste and what stands behind it."""

    org: str
    tier: str
    name: str
    pool_mode: str
    url: str


class DevStack:
    """The embedded stack: everything started and stopped as one."""

    def __init__(self, options: DevOptions, report: Report) -> None:
        self._options = options
        self._report = report
        self._state = State(options.state)
        self._parts = contextlib.AsyncExitStack()  # what runs, in order of its start
        self._children: list[Child] = []  # servers that run, in order of their start
        self.proxy: Engine | Supervisor | None = None  # set once it runs
        self.databases: list[DemoDatabase] = []
        self.console_url = ""  # of the operators' console, once it runs

    async def start(self) -> None:
        """Start all of it; dev.json is there when it is ready.

        Raises EmbeddedFailed when a port is in use, another stack runs on the
        directory or a part does not start; what was started is stopped then.
        """
        async with contextlib.AsyncExitStack() as parts:
            parts.enter_context(self._state)
            self._check_ports()
            await self._start(parts)
            self._parts = parts.pop_all()

    async def stop(self) -> None:
        """Let open transactions finish, for a bounded time, and stop all of it."""
        if self.proxy is not None:
            await self.proxy.drain()
        await self._parts.aclose()

    async def wait_ended(self) -> None:
        """Wait until an operator's SHUTDOWN asks for the end.

        Raises EmbeddedFailed once a part ended that nobody stopped.
        """
        assert self.proxy is not None
        asked = asyncio.create_task(self.proxy.stop_asked.wait())
        broken = [
            asyncio.create_task(self._wait_broken(child)) for child in self._children
        ]
        try:
            done, _ = await asyncio.wait(
                [asked, *broken], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            for task in (asked, *broken):
                task.cancel()

    async def _wait_broken(self, child: Child) -> NoReturn:
        status = await child.wait_ended()
        raise EmbeddedFailed(
            f"{child.title} ended unexpectedly (status {status}): see {child.log}"
        )

    @property
    def admin_url(self) -> str | None:
        """Where health and metrics are asked for, if anywhere."""
        admin = self.proxy.addresses["admin"] if self.proxy else None
        return f"http://{admin[0]}:{admin[1]}" if admin else None

    def _check_ports(self) -> None:
        options = self._options
        if options.port == options.admin_port != 0:
            raise EmbeddedFailed("--port and --admin-port must differ")
        for option, port in (
            ("--port", options.port),
            ("--admin-port", options.admin_port),
        ):
            try:
                if is_free(port, HOST):
                    continue
            except OSError as error:
                raise EmbeddedFailed(f"{option} {port}: {error.strerror}") from error
            raise EmbeddedFailed(
                f"{option} {port} is in use: choose another with {option}"
            )

    async def _start(self, parts: contextlib.AsyncExitStack) -> None:
        state = self._state
        kept = state.secrets
        # Settings of the environment hold, JWT_SECRET among them, but for those
        # that the stack itself decides.
        given = Config.load(None, os.environ)
        mongodb = await self._begin_mongodb(given.usage, parts)
        self._report("Starting Postgres")
        postgres = EmbeddedPostgres(
            state.directory / "postgres",
            password=Secret(kept["postgres_password"]),
            port=kept["postgres_port"],
            settings=POSTGRES_SETTINGS,
        )
        await self._start_child(postgres, parts)
        control = Control(
            database_url=Secret(postgres.local_dsn(CONTROL_DATABASE)),
            secret_key=Secret(kept["secret_key"]),
        )
        state.keep(
            postgres_port=postgres.port,
            database_url=postgres.local_dsn(CONTROL_DATABASE),
        )

        self._report("Starting Valkey")
        valkey = EmbeddedValkey(
            state.directory / "valkey",
            password=Secret(kept["valkey_password"]),
            port=kept["valkey_port"],
        )
        await self._start_child(valkey, parts)
        state.keep(valkey_port=valkey.port, redis_url=valkey.url)
        await _declare_new(Secret(valkey.url))

        self._report("Seeding the control plane and the demo organisations")
        seeder = Seeder(postgres, control, kept["orgs"], kept["operator_key"])
        await seeder.seed(CONTROL_DATABASE)

        if mongodb is not None:
            self._report("Waiting for MongoDB")
            await mongodb
        self._report("Starting the proxy")
        servers = {"max_servers": MAX_SERVERS} | given.pool.model_dump(
            include=given.pool.model_fields_set
        )
        config = given.model_copy(
            update={
                "listen": Listen(host=HOST, port=self._options.port),
                "admin": Admin(host=HOST, port=self._options.admin_port),
                "control": control,
                "redis": given.redis.model_copy(update={"url": Secret(valkey.url)}),
                "pool": Pool(**servers),
                "usage": Usage(
                    spool_dir=state.directory / "spool",
                    mongodb_url=state.secrets["mongodb_url"],
                ),
                "tls": state.certificate() if self._options.has_tls else Tls(),
                "workers": self._options.workers,
                "log": LOG,  # of the workers, if there are several
            }
        )
        proxy: Engine | Supervisor
        proxy = Engine(config) if config.workers == 1 else Supervisor(config)
        self.proxy = await parts.enter_async_context(proxy)
        addresses = proxy.addresses
        clients = addresses["postgres"]
        assert clients is not None
        port = clients[1]
        admin = addresses["admin"]
        self.databases = self._demo_databases(port)
        self.console_url = self._url(OPERATORS, kept["operator_key"], port, OPERATORS)
        parts.callback(state.remove_description)
        state.describe(
            {
                "pid": os.getpid(),
                "port": port,
                "admin_port": admin[1] if admin else None,
                "has_tls": self._options.has_tls,
                "postgres_url": postgres.dsn(CONTROL_DATABASE),
                "redis_url": valkey.url,
                "mongodb_url": state.secrets["mongodb_url"],
                "console_url": self.console_url,
                "orgs": [self._described(each) for each in ORGANIZATIONS],
            }
        )

    async def _begin_mongodb(
        self, usage: Usage, parts: contextlib.AsyncExitStack
    ) -> asyncio.Task[None] | None:
        """Begin to start the MongoDB-wire server, the slowest, where there is one.

        The URL is kept: the environment's, the server's, or none.
        """
        state = self._state
        if usage.mongodb_url is not None:
            state.keep(mongodb_url=usage.mongodb_url.get_secret_value())
            return None
        if not is_installed():
            state.keep(mongodb_url=None)
            self._report("Leaving out MongoDB, as SecantusDB is not installed")
            return None
        mongodb = EmbeddedMongo(
            state.directory / "mongodb", port=state.secrets["mongodb_port"]
        )

        async def start() -> None:
            await self._start_child(mongodb, parts)
            state.keep(mongodb_port=mongodb.port, mongodb_url=mongodb.url(MONGODB))

        starting = asyncio.create_task(start(), name="start-mongodb")

        async def give_up() -> None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

        parts.push_async_callback(give_up)
        return starting

    async def _start_child(
        self, child: Child, parts: contextlib.AsyncExitStack
    ) -> None:
        parts.push_async_callback(child.stop)
        await child.start()
        self._children.append(child)

    def _url(self, user: str, key: str, port: int, database: str) -> str:
        suffix = "?sslmode=require" if self._options.has_tls else ""
        return f"postgresql://{user}:{key}@{HOST}:{port}/{database}{suffix}"

    def _demo_databases(self, port: int) -> list[DemoDatabase]:
        return [
            DemoDatabase(
                organization.handle,
                organization.tier,
                name,
                mode.value,
                self._url(organization.handle, self._key(organization), port, name),
            )
            for organization in ORGANIZATIONS
            for name, mode in organization.databases.items()
        ]

    def _described(self, organization: DemoOrganization) -> dict[str, Any]:
        return {
            "org": organization.handle,
            "tier": organization.tier,
            "api_key": self._key(organization),
            "databases": [
                {"name": each.name, "type": "postgres", "url": each.url}
                for each in self.databases
                if each.org == organization.handle
            ],
        }

    def _key(self, organization: DemoOrganization) -> str:
        key: str = self._state.secrets["orgs"][organization.handle]["api_key"]
        return key


class State:
    """The state directory of one stack, locked while it is entered."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._lock: int | None = None  # descriptor that holds the lock
        #: What must stay the same from start to start; only `keep` changes it.
        self.secrets: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(
                self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise EmbeddedFailed(
                f"--state {self.directory}: {error.strerror}"
            ) from error
        try:
            self._enter(self._lock)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _enter(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 20, 0).decode() or "unknown"
            raise EmbeddedFailed(
                f"another ogelproxy dev (process {owner}) runs on {self.directory}: "
                "stop it or choose another directory with --state"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        # A killed run could not remove it, and it names a process that is gone.
        self.remove_description()
        self._load()

    def _load(self) -> None:
        path = self.directory / "secrets.json"
        if path.exists():
            self.secrets = orjson.loads(path.read_bytes())
            # One made before there was a console, or another part, lacks theirs.
            self.secrets = _new_secrets() | self.secrets
            return
        if (self.directory / "postgres" / "data").exists():
            raise EmbeddedFailed(
                f"{path} is missing, and without it the data beside it can't be "
                f"opened: remove {self.directory} to start afresh"
            )
        self.keep(**_new_secrets())

    def keep(self, **values: Any) -> None:
        """Change `secrets` and its file, both or neither."""
        self.secrets |= values
        _write_private(self.directory / "secrets.json", _json(self.secrets))

    def describe(self, description: dict[str, Any]) -> None:
        """Write dev.json, which says that the stack is ready."""
        _write_private(self.directory / "dev.json", _json(description))

    def remove_description(self) -> None:
        (self.directory / "dev.json").unlink(missing_ok=True)

    def certificate(self) -> Tls:
        """Return a self-signed certificate of loopback, made when there is none."""
        cert, key = self.directory / "tls.pem", self.directory / "tls.key"
        now = datetime.datetime.now(datetime.UTC)
        if cert.exists() and key.exists():
            loaded = x509.load_pem_x509_certificate(cert.read_bytes())
            if loaded.not_valid_after_utc - now > CERTIFICATE_RENEWAL:
                return Tls(cert=cert, key=key)
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        names = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + CERTIFICATE_LIFETIME)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .sign(private, hashes.SHA256())
        )
        _write_private(
            key,
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
        _write_private(cert, made.public_bytes(serialization.Encoding.PEM))
        return Tls(cert=cert, key=key)


async def _declare_new(url: Secret) -> None:
    """Tell a Redis that was started a moment ago that it has forgotten nothing."""
    redis = Redis(RedisConfig(url=url))
    try:
        await redis.declare_new()
    finally:
        await redis.stop()


def kept_config(directory: Path) -> Config:
    """Return the settings of the stack on `directory`, for commands beside it.

    Raises ConfigInvalid where there is none, or none that runs.
    """
    try:
        kept = orjson.loads((directory / "secrets.json").read_bytes())
        running = orjson.loads((directory / "dev.json").read_bytes())
        cert, key = directory / "tls.pem", directory / "tls.key"
        return Config(
            listen=Listen(host=HOST, port=running["port"]),
            admin=Admin(host=HOST, port=running["admin_port"]),
            tls=Tls(cert=cert, key=key) if running["has_tls"] else Tls(),
            control=Control(
                database_url=Secret(kept["database_url"]),
                secret_key=Secret(kept["secret_key"]),
            ),
            redis=RedisConfig(url=Secret(kept["redis_url"])),
            usage=Usage(
                spool_dir=directory / "spool", mongodb_url=running["mongodb_url"]
            ),
        )
    except OSError as error:
        raise ConfigInvalid(
            f"--state {directory}: no dev stack runs there ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError):
        # Without the reason: it would quote what the files hold.
        raise ConfigInvalid(f"--state {directory}: not a dev stack's") from None


def _new_secrets() -> dict[str, Any]:
    return {
        "postgres_password": secrets.token_urlsafe(24),
        "postgres_port": None,
        "valkey_password": secrets.token_urlsafe(24),
        "valkey_port": None,
        "mongodb_port": None,
        "secret_key": Fernet.generate_key().decode(),
        "operator_key": apikey.generate(),
        "orgs": {
            organization.handle: {
                "api_key": apikey.generate(),
                "role_password": secrets.token_urlsafe(24),
            }
            for organization in ORGANIZATIONS
        },
    }


def _json(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _write_private(path: Path, content: bytes) -> None:
    """Replace the file at once, readable by its owner only."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
