"""Tables: what `SHOW …` of the operators' console tells of an engine.

Columns, their order and types are those of PgBouncer's console (its doc/usage.md and
src/admin.c, 1.25), so that what reads that one reads this one; what PgBouncer has no
word for follows at the end. A database is `organisation/name`. Times are text, sizes
bytes, durations microseconds, as there.
"""

from __future__ import annotations

import os
import ssl
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from operator import add
from typing import TYPE_CHECKING, Any

from ogelproxy.client import Client
from ogelproxy.config import Config, Secret, Section
from ogelproxy.console import columns
from ogelproxy.console.sums import Row, Rule, first, rules_of, summed
from ogelproxy.protocol.rows import Column
from ogelproxy.server import Server
from ogelproxy.traffic import NO_RATES, Work, averages

if TYPE_CHECKING:
    from ogelproxy.console.operator import Parts
    from ogelproxy.pool import Pool

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

#: What SHOW LISTS counts, in PgBouncer's order.
LIST_NAMES = (
    "databases users peers pools peer_pools free_clients used_clients login_clients "
    "free_servers used_servers dns_names dns_zones dns_queries dns_pending"
).split()
#: Bits that a file descriptor has room in, in numbers that tell connections apart.
FD_BITS = 20

#: Session settings that drivers ask for.
SESSION = {
    "client_encoding": "UTF8",
    "datestyle": "ISO, MDY",
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
    "timezone": "UTC",
}


#: How rows of `Tables._worked` become one: name, counts, rates and TENANT.
WORKED = (first, *[add] * 2 * len(columns.WORK), first, first)


@dataclass(frozen=True, slots=True)
class Table:
    """Something that SHOW shows."""

    columns: tuple[Column, ...]
    #: What one process tells.
    rows: Callable[[], Iterable[Row]]
    #: How rows of several processes become one; None where each has its own.
    rules: Sequence[Rule] | None = None
    key: int = 1  # values that say which rows are of one thing
    #: Makes what is shown of what was told.
    shown: Callable[[list[Row]], Iterable[Row]] = iter
    #: Whether any process tells for all.
    is_common: bool = False

    def show(self, told: list[Row]) -> Iterable[Row]:
        """Return what is shown of the rows that all processes told."""
        if self.rules is not None:
            told = summed(told, self.rules, self.key)
        return self.shown(told)


class Tables:
    """What SHOW shows of one engine; by name, in the order of HELP."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        nothing = tuple[Row, ...]  # the class, called: no rows
        self._tables = {
            "databases": _added(columns.DATABASES, self._databases),
            "pools": _added(columns.POOLS, self._pools, _with_seconds),
            "clients": Table(columns.CLIENTS, self._clients),
            "servers": Table(columns.SERVERS, self._servers),
            "sockets": Table(columns.ALL_SOCKETS, self._sockets),
            "active_sockets": Table(columns.ALL_SOCKETS, self._active_sockets),
            "stats": Table(columns.STATS, self._worked, WORKED, 1, _stats),
            "stats_totals": Table(
                columns.STATS_TOTALS, self._worked, WORKED, 1, _stats_totals
            ),
            "stats_averages": Table(
                columns.STATS_AVERAGES, self._worked, WORKED, 1, _stats_averages
            ),
            "totals": Table(columns.TOTALS, self._totals, WORKED, 1, _totals),
            "users": _added(columns.USERS, self._users, _by_name),
            "lists": Table(columns.LISTS, self._lists, (first, first, add), 2, _lists),
            "config": Table(columns.CONFIG, self._config, is_common=True),
            "state": Table(columns.STATE, self._state, is_common=True),
            "version": Table(columns.VERSION, self._version, is_common=True),
            # There are none of these here; what asks for them shall not fail.
            "peers": Table(columns.PEERS, nothing, is_common=True),
            "peer_pools": Table(columns.PEER_POOLS, nothing, is_common=True),
            "dns_hosts": Table(columns.DNS_HOSTS, nothing, is_common=True),
            "dns_zones": Table(columns.DNS_ZONES, nothing, is_common=True),
        }
        parts.peers.add_source("table", lambda name: self._tables[name].rows())

    @property
    def names(self) -> list[str]:
        return list(self._tables)

    def find(self, name: str) -> Table | None:
        """Return what `SHOW name` shows."""
        if name in SESSION:
            rows = [(SESSION[name],)]
            return Table((Column(name),), lambda: rows, is_common=True)
        return self._tables.get(name)

    async def rows(self, name: str) -> tuple[Iterable[Row], list[str]]:
        """Return the rows of a table that there is, of all workers.

        Beside them a text for each worker that did not answer.
        """
        table = self.find(name)
        assert table is not None
        if table.is_common:
            return table.show(list(table.rows())), []
        told, silent = await self._parts.peers.gather("table", name)
        return table.show(told), silent

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
                int(pool.target.id in router.orders.disabled),
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
                0,
                int(waited * 1e6),  # with the seconds, so that it can be compared
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
            pins = ", ".join(client.pins)
            yield (*self._client(client), *tenant, pins, self._parts.peers.place)

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
            _pointer(client),
            "" if client.server is None else _pointer(client.server),
            0,
            _tls(client.tls),
            _text(session.application_name),
            client.prepared_count,
            session.process_id,
        )

    def _servers(self) -> Iterator[Row]:
        for server in self._connections(Server):
            tenant = self._tenant(server.pool.handle)
            yield (*self._server(server), *tenant, self._parts.peers.place)

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
            _pointer(server),
            "" if client is None else _pointer(client),
            _int4(server.process_id),
            _tls(server.tls),
            "" if client is None else _text(client.session.application_name),
            server.prepared_count,
            _int4((self._parts.peers.place or 0) << FD_BITS | server.fd),
        )

    def _sockets(self) -> Iterator[Row]:
        for client in self._logged_in():
            tenant = self._tenant(client.session.handle)
            row = (*self._client(client), *_buffers(client))
            yield (*row, *tenant, self._parts.peers.place)
        for server in self._connections(Server):
            tenant = self._tenant(server.pool.handle)
            row = (*self._server(server), *_buffers(server))
            yield (*row, *tenant, self._parts.peers.place)

    def _active_sockets(self) -> Iterator[Row]:
        states = [column.name for column in columns.SOCKETS].index("state")
        return (row for row in self._sockets() if row[states] != "idle")

    # What was done.

    def _worked(self) -> Iterator[Row]:
        """Each database with its counts and their rates, and TENANT."""
        work = self._parts.traffic.work()
        rates = self._parts.traffic.rates(self._parts.relay.reactor.loop.time())
        for name, pools in self._by_database():
            ids = {pool.target.id for pool in pools} & work.keys()
            total = sum((work[each] for each in ids), Work())
            rate = map(sum, zip(NO_RATES, *(rates[each] for each in ids), strict=True))
            yield (name, *astuple(total), *rate, *self._tenant(pools[0].handle))

    def _totals(self) -> Iterator[Row]:
        traffic = self._parts.traffic
        total = sum(traffic.work().values(), traffic.past())
        rates = traffic.rates(self._parts.relay.reactor.loop.time())
        rate = map(sum, zip(NO_RATES, *rates.values(), strict=True))
        yield ("", *astuple(total), *rate, None, None)

    # The proxy.

    def _users(self) -> Iterator[Row]:
        servers: Counter[str] = Counter()
        for pool in self._parts.router.pools:
            servers[pool.handle] += pool.size
        for handle in {*servers, *self._parts.relay.clients}:
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
        # Of what several workers may have, each; `_lists` counts them.
        for name in {name_of(pool) for pool in pools}:
            yield "databases", name, 0
        for handle in {pool.handle for pool in pools} | parts.relay.clients.keys():
            yield "users", handle, 0
        yield "pools", None, len(pools)
        yield "used_clients", None, clients
        yield "login_clients", None, logins - parts.console_count()
        yield "used_servers", None, sum(pool.size for pool in pools)

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
        is_paused = self._parts.router.orders.is_paused
        yield "active", "no" if is_paused else "yes"
        yield "paused", "yes" if is_paused else "no"
        yield "suspended", "no"

    def _version(self) -> Iterator[Row]:
        yield (f"ogelproxy {version('ogelproxy')}",)


def name_of(pool: Pool) -> str:
    """Return a pool's database as the console calls it."""
    return f"{pool.handle}/{pool.target.name}"


def _added(
    columns: tuple[Column, ...],
    rows: Callable[[], Iterable[Row]],
    shown: Callable[[list[Row]], Iterable[Row]] = iter,
) -> Table:
    """A table whose rows are added up as they are."""
    return Table(columns, rows, rules_of(columns), shown=shown)


# What is shown of what was told.


def _by_name(told: list[Row]) -> list[Row]:
    return sorted(told, key=lambda row: str(row[0]))


def _with_seconds(told: list[Row]) -> Iterator[Row]:
    seconds = [column.name for column in columns.POOLS].index("maxwait")
    for row in told:
        wait = divmod(row[seconds + 1], 1_000_000)
        yield (*row[:seconds], *wait, *row[seconds + 2 :])


def _parted(told: list[Row]) -> Iterator[tuple[str, Row, Row, Row]]:
    """Cut rows of `_worked`: name, counts, averages, and TENANT."""
    count = len(columns.WORK)
    for name, *rest in told:
        rates = rest[count : 2 * count]
        yield name, rest[:count], averages(rates), rest[2 * count :]


def _stats(told: list[Row]) -> Iterator[Row]:
    for name, total, average, tenant in _parted(told):
        yield (name, *total, *average, *tenant)


def _stats_totals(told: list[Row]) -> Iterator[Row]:
    for name, total, _, tenant in _parted(told):
        yield (name, *total, *tenant)


def _stats_averages(told: list[Row]) -> Iterator[Row]:
    for name, _, average, tenant in _parted(told):
        yield (name, *average, *tenant)


def _totals(told: list[Row]) -> Iterator[Row]:
    for _, total, average, _ in _parted(told):
        for prefix, numbers in (("total", total), ("avg", average)):
            for name, number in zip(columns.TOTAL_NAMES, numbers, strict=True):
                yield f"{prefix}_{name}", number


def _lists(told: list[Row]) -> Iterator[Row]:
    items: Counter[str] = Counter()
    for name, item, count in told:
        items[name] += count if item is None else 1
    for name in LIST_NAMES:
        yield name, items[name]


def _pointer(connection: Client | Server) -> str:
    """What no other connection of the machine has."""
    return f"{os.getpid() << FD_BITS | connection.fd:#x}"


def _text(said: str) -> str:
    """A client's word for itself, as UTF-8 can hold it."""
    return said.encode("utf-8", "replace").decode()


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
