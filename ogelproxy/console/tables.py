"""Tables: what `SHOW …` of the operators' console tells of an engine.

Columns, their order and types are those of PgBouncer's console (its doc/usage.md and
src/admin.c, 1.25), so that what reads that one reads this one; what PgBouncer has no
word for follows at the end. A database is `organisation/name`. Times are text, sizes
bytes, durations microseconds, as there.
"""

from __future__ import annotations

import ssl
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import add
from typing import TYPE_CHECKING, Any

from ogelproxy.client import Client
from ogelproxy.config import Config, Secret, Section
from ogelproxy.protocol.rows import Column, Type, Value
from ogelproxy.server import Server
from ogelproxy.traffic import Work

if TYPE_CHECKING:
    from ogelproxy.console.operator import Parts
    from ogelproxy.pool import Pool

Row = Sequence[Value]

#: Phases of a server (`_loan`), as PgBouncer names the states.
SERVER_STATES = {0: "new", 1: "idle", 2: "active", 3: "tested", 4: "active_cancel"}

#: Settings by the names that PgBouncer's users look for.
ALIASES = {
    "default_pool_size": "pool.max_servers",
    "listen_addr": "listen.host",
    "listen_port": "listen.port",
    "max_client_conn": "listen.max_clients",
    "max_prepared_statements": "pool.max_prepared_statements",
    "query_wait_timeout": "pool.queue_timeout",
    "server_connect_timeout": "pool.connect_timeout",
    "server_idle_timeout": "pool.server_idle_timeout",
    "server_lifetime": "pool.server_lifetime",
    "server_reset_query": "pool.reset_query",
}
#: Sections, and settings, that RELOAD applies.
CHANGEABLE = ("tls.", "pool.", "client.", "limits.", "drain_timeout")
CHANGEABLE_TOO = ("listen.login_timeout",)

#: Session settings that drivers ask for.
SESSION = {
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
    "timezone": "UTC",
}


def _columns(text: str, type: Type = Type.TEXT) -> tuple[Column, ...]:
    return tuple(Column(name, type) for name in text.split())


#: Behind PgBouncer's own columns, where a row is of one database or connection.
TENANT = _columns("tenant tier")

DATABASES = (
    *_columns("name host"),
    *_columns("port", Type.INT4),
    *_columns("database force_user"),
    *_columns("pool_size min_pool_size reserve_pool_size server_lifetime", Type.INT4),
    *_columns("pool_mode load_balance_hosts"),
    *_columns("max_connections current_connections", Type.INT4),
    *_columns("max_client_connections current_client_connections", Type.INT4),
    *_columns("paused disabled", Type.INT4),
    *TENANT,
    *_columns("circuit"),
)
POOLS = (
    *_columns("database user"),
    *_columns("cl_active cl_waiting cl_active_cancel_req", Type.INT4),
    *_columns("cl_waiting_cancel_req sv_active sv_active_cancel", Type.INT4),
    *_columns("sv_being_canceled sv_idle sv_used sv_tested sv_login", Type.INT4),
    *_columns("maxwait maxwait_us", Type.INT4),
    *_columns("pool_mode load_balance_hosts"),
    *TENANT,
)
SOCKETS = (
    *_columns("type user database replication state addr"),
    *_columns("port", Type.INT4),
    *_columns("local_addr"),
    *_columns("local_port", Type.INT4),
    *_columns("connect_time request_time"),
    *_columns("wait wait_us close_needed", Type.INT4),
    *_columns("ptr link"),
    *_columns("remote_pid", Type.INT4),
    *_columns("tls application_name"),
    *_columns("prepared_statements id", Type.INT4),
)
BUFFERS = _columns(
    "recv_pos pkt_pos pkt_remain send_pos send_remain pkt_avail send_avail", Type.INT4
)
#: The numbers of `Work`, in its order.
WORK = (
    "server_assignment_count xact_count query_count received sent xact_time query_time "
    "wait_time client_parse_count server_parse_count bind_count client_login_count"
).split()
STATS = (
    Column("database"),
    *(Column(f"total_{name}", Type.NUMERIC) for name in WORK),
    *(Column("avg_" + name.replace("received", "recv"), Type.NUMERIC) for name in WORK),
    *TENANT,
)
STATS_TOTALS = (
    Column("database"),
    *(
        Column(f"bytes_{name}" if name in ("received", "sent") else name, Type.NUMERIC)
        for name in WORK
    ),
    *TENANT,
)
#: As PgBouncer has it: only the later ones say that they are averages.
STATS_AVERAGES = (
    *STATS_TOTALS[:9],
    *(Column(f"avg_{name}", Type.NUMERIC) for name in WORK[8:]),
    *TENANT,
)
#: PgBouncer names these as its source does.
TOTALS = [
    {"received": "client_bytes", "sent": "server_bytes"}.get(name, name)
    if not name.endswith(("parse_count", "bind_count"))
    else f"ps_{name}"
    for name in WORK
]
USERS = (
    *_columns("name pool_size reserve_pool_size pool_mode"),
    *_columns("max_user_connections current_connections", Type.INT4),
    *_columns("max_user_client_connections current_client_connections", Type.INT4),
    *_columns("tier"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Something that SHOW shows."""

    columns: tuple[Column, ...]
    rows: Callable[[], Iterable[Row]]


class Tables:
    """What SHOW shows of one engine; by name, in the order of HELP."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        nothing = tuple[Row, ...]  # the class, called: no rows
        self._tables = {
            "databases": Table(DATABASES, self._databases),
            "pools": Table(POOLS, self._pools),
            "clients": Table((*SOCKETS, *TENANT, Column("pins")), self._clients),
            "servers": Table((*SOCKETS, *TENANT), self._servers),
            "sockets": Table((*SOCKETS, *BUFFERS, *TENANT), self._sockets),
            "active_sockets": Table(
                (*SOCKETS, *BUFFERS, *TENANT), self._active_sockets
            ),
            "stats": Table(STATS, self._stats),
            "stats_totals": Table(STATS_TOTALS, self._stats_totals),
            "stats_averages": Table(STATS_AVERAGES, self._stats_averages),
            "totals": Table(
                (Column("name"), Column("value", Type.NUMERIC)), self._totals
            ),
            "users": Table(USERS, self._users),
            "lists": Table((Column("list"), Column("items", Type.INT4)), self._lists),
            "config": Table(_columns("key value default changeable"), self._config),
            "state": Table(_columns("key value"), self._state),
            "version": Table(_columns("version"), self._version),
            # There are none of these here; what asks for them shall not fail.
            "peers": Table(
                (
                    *_columns("peer_id", Type.INT4),
                    *_columns("host"),
                    *_columns("port pool_size", Type.INT4),
                ),
                nothing,
            ),
            "peer_pools": Table(
                _columns(
                    "peer_id cl_active_cancel_req cl_waiting_cancel_req "
                    "sv_active_cancel sv_login",
                    Type.INT4,
                ),
                nothing,
            ),
            "dns_hosts": Table(
                (Column("hostname"), Column("ttl", Type.INT8), Column("addrs")), nothing
            ),
            "dns_zones": Table(
                (
                    Column("zonename"),
                    Column("serial", Type.INT8),
                    Column("count", Type.INT4),
                ),
                nothing,
            ),
        }

    @property
    def names(self) -> list[str]:
        return list(self._tables)

    def find(self, name: str) -> Table | None:
        """Return what `SHOW name` shows."""
        if name in SESSION:
            return Table((Column(name),), lambda: [(SESSION[name],)])
        return self._tables.get(name)

    # Pools.

    def _tenant(self, handle: str) -> tuple[str, str | None]:
        """The columns of TENANT."""
        tenant = self._parts.tenants.peek(handle)
        return handle, None if tenant is None else tenant.tier.name

    def _by_database(self) -> Iterable[tuple[str, list[Pool]]]:
        """The pools by their database's name, those that are routed to first.

        A database has several while old ones end, or for clients that replicate; who
        reads the tables expects one row of each.
        """
        pools: defaultdict[str, list[Pool]] = defaultdict(list)
        for pool in self._parts.router.pools:
            pools[name_of(pool)].append(pool)
        return pools.items()

    def _databases(self) -> Iterator[Row]:
        router = self._parts.router
        for name, pools in self._by_database():
            pool = pools[0]
            tenant = self._parts.tenants.peek(pool.handle)
            yield (
                name,
                pool.address.host,
                pool.address.port,
                pool.address.database,
                pool.address.user,
                pool.config.max_servers,
                0,
                0,
                round(pool.config.server_lifetime),
                str(pool.target.pool_mode),
                None,
                pool.config.max_servers,
                sum(each.size for each in pools),
                0 if tenant is None else tenant.max_connections,
                sum(each.client_count for each in pools),
                int(pool.is_paused),
                int(router.is_disabled(pool.target.id)),
                *self._tenant(pool.handle),
                pool.circuit.state,
            )

    def _pools(self) -> Iterator[Row]:
        states: Counter[tuple[str, str]] = Counter()
        for server in self._connections(Server):
            states[name_of(server.pool), _server_state(server)] += 1
        now = self._parts.relay.reactor.loop.time()
        for name, pools in self._by_database():
            waiting = [client for pool in pools for client in pool.waiting_clients]
            waited = max((now - each.waiting_since for each in waiting), default=0.0)
            yield (
                name,
                pools[0].handle,
                sum(pool.client_count for pool in pools) - len(waiting),
                len(waiting),
                0,
                0,
                states[name, "active"],
                states[name, "active_cancel"],
                states[name, "being_canceled"],
                states[name, "idle"],
                0,
                states[name, "tested"],
                sum(pool.opening for pool in pools),
                int(waited),
                int(waited % 1 * 1e6),
                str(pools[0].target.pool_mode),
                None,
                *self._tenant(pools[0].handle),
            )

    # Connections.

    def _connections(self, kind: type[Any]) -> Iterator[Any]:
        for connection in self._parts.relay.reactor.connections:
            if isinstance(connection, kind):
                yield connection

    def _logged_in(self) -> Iterator[Client]:
        for members in list(self._parts.relay.clients.values()):
            yield from members

    def _clients(self) -> Iterator[Row]:
        for client in self._logged_in():
            tenant = self._tenant(client.session.handle)
            yield (*self._client(client), *tenant, ", ".join(client.pins))

    def _client(self, client: Client) -> Row:
        session, now = client.session, self._parts.relay.reactor.loop.time()
        state = "idle" if client.server is None else "active"
        waited = 0.0
        if client.waiting_since:
            state, waited = "waiting", now - client.waiting_since
        local = self._parts.address()
        return (
            "C",
            session.handle,
            f"{session.handle}/{session.database}",
            "none",
            state,
            session.address or "unix",
            client.port,
            *(local or ("", 0)),
            _moment(session.connected_at.timestamp()),
            _moment(time.time() - (now - client.active_at)),
            int(waited),
            int(waited % 1 * 1e6),
            0,
            f"{client.fd:#x}",
            "" if client.server is None else f"{client.server.fd:#x}",
            0,
            _tls(client.tls),
            session.application_name,
            client.prepared_count,
            session.process_id,
        )

    def _servers(self) -> Iterator[Row]:
        for server in self._connections(Server):
            yield (*self._server(server), *self._tenant(server.pool.handle))

    def _server(self, server: Server) -> Row:
        pool, client = server.pool, server.client
        now = self._parts.relay.reactor.loop.time()
        connected = _moment(time.time() - (now - (server.opened_at or now)))
        return (
            "S",
            pool.address.user,
            name_of(pool),
            "none",
            _server_state(server),
            pool.address.host,
            pool.address.port,
            "",
            0,
            connected,
            connected
            if not server.idle_since
            else _moment(time.time() - (now - server.idle_since)),
            0,
            0,
            int(server.is_retiring or server.epoch != pool.epoch),
            f"{server.fd:#x}",
            "" if client is None else f"{client.fd:#x}",
            _int4(server.process_id),
            _tls(server.tls),
            "" if client is None else client.session.application_name,
            server.prepared_count,
            server.fd,
        )

    def _sockets(self) -> Iterator[Row]:
        for client in self._logged_in():
            tenant = self._tenant(client.session.handle)
            yield (*self._client(client), *_buffers(client), *tenant)
        for server in self._connections(Server):
            tenant = self._tenant(server.pool.handle)
            yield (*self._server(server), *_buffers(server), *tenant)

    def _active_sockets(self) -> Iterator[Row]:
        states = [column.name for column in SOCKETS].index("state")
        return (row for row in self._sockets() if row[states] != "idle")

    # What was done.

    def _worked(self) -> Iterator[tuple[str, Work, Work, Row]]:
        """Each database with its totals and averages, and the columns of TENANT."""
        work = self._parts.traffic.work()
        rates = self._parts.traffic.rates(self._parts.relay.reactor.loop.time())
        for name, pools in self._by_database():
            ids = {pool.target.id for pool in pools}
            totals, averages = (
                reduce(add, (known[each] for each in ids if each in known), Work())
                for known in (work, rates)
            )
            yield name, totals, averages, self._tenant(pools[0].handle)

    def _stats(self) -> Iterator[Row]:
        for name, total, average, tenant in self._worked():
            yield (name, *astuple(total), *astuple(average), *tenant)

    def _stats_totals(self) -> Iterator[Row]:
        for name, total, _, tenant in self._worked():
            yield (name, *astuple(total), *tenant)

    def _stats_averages(self) -> Iterator[Row]:
        for name, _, average, tenant in self._worked():
            yield (name, *astuple(average), *tenant)

    def _totals(self) -> Iterator[Row]:
        traffic = self._parts.traffic
        total = reduce(add, traffic.work().values(), traffic.past())
        rates = traffic.rates(self._parts.relay.reactor.loop.time())
        average = reduce(add, rates.values(), Work())
        for prefix, work in (("total", total), ("avg", average)):
            for name, value in zip(TOTALS, astuple(work), strict=True):
                yield f"{prefix}_{name}", value

    # The proxy.

    def _users(self) -> Iterator[Row]:
        servers: Counter[str] = Counter()
        for pool in self._parts.router.pools:
            servers[pool.handle] += pool.size
        for handle in sorted({*servers, *self._parts.relay.clients}):
            tenant = self._parts.tenants.peek(handle)
            yield (
                handle,
                "",
                "",
                None,
                0,
                servers[handle],
                0 if tenant is None else tenant.max_connections,
                self._parts.gate.count(handle),
                None if tenant is None else tenant.tier.name,
            )

    def _lists(self) -> Iterator[Row]:
        parts = self._parts
        pools, clients = parts.router.pools, parts.relay.client_count
        logins = sum(each.is_logging_in for each in self._connections(Client))
        yield "databases", len({pool.target.id for pool in pools})
        yield "users", len({pool.handle for pool in pools} | parts.relay.clients.keys())
        yield "peers", 0
        yield "pools", len(pools)
        yield "peer_pools", 0
        yield "free_clients", 0
        yield "used_clients", clients
        yield "login_clients", logins - parts.console_count()
        yield "free_servers", 0
        yield "used_servers", sum(pool.size for pool in pools)
        for name in ("dns_names", "dns_zones", "dns_queries", "dns_pending"):
            yield name, 0

    def _config(self) -> Iterator[Row]:
        config, default = self._parts.config(), Config()
        names = {name: name for name in Config.settings()} | ALIASES
        for shown, name in sorted(names.items()):
            is_changeable = name.startswith(CHANGEABLE) or name in CHANGEABLE_TOO
            yield (
                shown,
                _setting(config, name),
                _setting(default, name),
                "yes" if is_changeable else "no",
            )

    def _state(self) -> Iterator[Row]:
        is_paused = self._parts.router.is_paused
        yield "active", "no" if is_paused else "yes"
        yield "paused", "yes" if is_paused else "no"
        yield "suspended", "no"

    def _version(self) -> Iterator[Row]:
        yield (f"ogelproxy {version('ogelproxy')}",)


def name_of(pool: Pool) -> str:
    """Return a pool's database as the console calls it."""
    return f"{pool.handle}/{pool.target.name}"


def _server_state(server: Server) -> str:
    if server.cancels:
        return "being_canceled"
    return SERVER_STATES[server.phase]


def _buffers(connection: Client | Server) -> Row:
    # Where PgBouncer's parser stands means nothing here.
    return (0, 0, 0, 0, 0, 0, _int4(connection.unsent))


def _moment(seconds: float) -> str:
    """A Unix time as PgBouncer writes it."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _tls(tls: ssl.SSLObject | None) -> str:
    cipher = None if tls is None else tls.cipher()
    return "" if tls is None or cipher is None else f"{tls.version()}/{cipher[0]}"


def _int4(number: int) -> int:
    return min(number, 2**31 - 1)


def _setting(config: Section, name: str) -> str | None:
    """A setting's value as text; that of a secret is starred."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    if value is None:
        return None
    return "****" if isinstance(value, Secret) else str(value)
