"""Tenant: what a tenant may ask about itself on its own connection.

`SHOW o7s.whoami` and the like, in any database and pool mode, without a server, a
token or usage. Every view is of the asking client's organisation, and no other's
rows are looked at. How the messages reach this place is `_views`'.
"""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import add
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ogelproxy.console.portals import Portals, Refused, Result, complete, render
from ogelproxy.console.sums import Row, Rule, first, summed
from ogelproxy.errors import LineFailed, ProtocolViolation
from ogelproxy.protocol import messages
from ogelproxy.protocol.rows import Column, Type, text
from ogelproxy.usage.ledger import MAX_STATEMENTS

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.console.peers import Peers
    from ogelproxy.gate import Gate
    from ogelproxy.limiter import Limiter
    from ogelproxy.relay import Tenants
    from ogelproxy.tenants.model import Tenant
    from ogelproxy.usage.ledger import Ledger

#: A view's statement, alone in its text. Behind it only what means nothing; atomic
#: groups, so that no text takes long to refuse.
STATEMENT = re.compile(
    rb"[ \t\r\n]*show o7s\.(\w+)(?>[\s;]+|--[^\n]*|/\*(?s:.*?)\*/)*+\Z", re.IGNORECASE
)
#: The slowest statements that are shown.
SLOW_COUNT = 20
#: Views that a process asks the other workers about at once.
MAX_ASKED = 16


@dataclass(frozen=True, slots=True)
class View:
    """One of the things that may be shown, and how its rows are made."""

    about: str
    columns: tuple[Column, ...]
    #: Makes the rows of what all processes told.
    show: Callable[[Client, Tenant, list[Row]], Iterable[Row]]
    #: What one process tells of an organisation; None where nobody has to be asked.
    tell: Callable[[str, UUID], Iterable[Row]] | None = None
    #: As of `tables.Table`.
    rules: Sequence[Rule] | None = None
    key: int = 1


@dataclass(frozen=True, slots=True)
class Told:
    """What the workers of the machine told for a view."""

    rows: list[Row]
    silent: list[str]  # a text for each that did not answer


class TenantConsole:
    """The views of one engine's tenants."""

    def __init__(
        self,
        *,
        tenants: Tenants,
        gate: Gate,
        ledger: Ledger,
        limiter: Limiter,
        members: Mapping[str, Iterable[Client]],
        peers: Peers,
        spawn: Callable[[Coroutine[Any, Any, object]], None],
    ) -> None:
        self._tenants = tenants
        self._gate = gate
        self._ledger = ledger
        self._limiter = limiter
        self._members = members  # the clients of each organisation
        self._peers = peers
        self.spawn = spawn
        # A view is free: who asks for ever has to wait for others who do.
        self._asking = asyncio.Semaphore(MAX_ASKED)
        self._views = {
            "help": View("what there is to show", HELP, self._help),
            "whoami": View("this connection", WHOAMI, self._whoami),
            "limits": View(
                "what the tier allows, and what is left",
                LIMITS,
                self._limits,
                self._tell_limits,
                (first, *[add] * 5),
            ),
            "usage": View(
                "today's use (UTC) of each database",
                USAGE,
                _usage,
                self._tell_usage,
                (first, first, min, *[add] * 11),
                key=2,
            ),
            "pins": View(
                "connections that keep their server", PINS, _pins, self._tell_pins
            ),
            "slow": View(
                "today's slowest statements",
                SLOW,
                _slow,
                self._tell_slow,
                (first, first, *[add] * 4, *[max] * 3),
                key=2,
            ),
        }
        peers.add_source("view", self._tell)

    def find(self, text: bytes) -> View | None:
        """Return the view that a statement shows; None for any other statement."""
        found = STATEMENT.match(text)
        return self._views.get(found[1].decode().lower()) if found else None

    def tenant_of(self, client: Client) -> Tenant:
        """Return who asks. Raises Refused."""
        tenant = self._tenants.peek(client.session.handle)
        if tenant is None:
            raise Refused("57P03", "the organisation's record is not at hand")
        return tenant

    def tell(self, view: View, tenant: Tenant) -> Told | None:
        """Return what was told of an organisation; None if others are to be asked."""
        if view.tell is None:
            return Told([], [])
        if self._peers.has_others:
            return None
        return Told(list(view.tell(tenant.handle, tenant.id)), [])

    async def gather(self, view: View, tenant: Tenant) -> Told:
        """Ask all workers of the machine, as `tell` does one."""
        name = next(name for name, each in self._views.items() if each is view)
        async with self._asking:
            about = (name, tenant.handle, str(tenant.id))
            rows, silent = await self._peers.gather("view", about)
            if name == "limits":
                rows.append(await self._total(tenant.handle))
        return Told(rows, silent)

    async def _total(self, handle: str) -> Row:
        """A row of `_tell_limits` for the connections over all machines."""
        try:
            total = await self._peers.tell("slot.total", handle)
        except (LineFailed, TimeoutError):
            total = self._gate.total(handle)
        return (handle, 0, 0, 0, 0, total)

    def _tell(self, about: tuple[str, str, str]) -> Iterable[Row]:
        name, handle, org_id = about
        tell = self._views[name].tell
        assert tell is not None
        return tell(handle, UUID(org_id))

    def open(self) -> Views:
        """Make what answers one client."""
        return Views(self)

    # What this process knows.

    def _tell_limits(self, handle: str, org_id: UUID) -> Iterable[Row]:
        """The handle; tokens, queries admitted, refused, in flight; connections."""
        bucket = self._limiter.peek(handle)
        refused = sum(total.refused for total in self._ledger.databases(org_id))
        # With others, somebody else knows how many connections there are.
        count = 0 if self._peers.has_others else self._gate.total(handle)
        level, admitted = 0.0, 0
        if bucket is not None:
            level = bucket.level_at(self._limiter.clock())
            admitted = bucket.admitted
        # All of its clients share one count.
        flights = [each.flights.count for each in self._members.get(handle, ())]
        yield handle, level, admitted, refused, max(flights, default=0), count

    def _tell_usage(self, handle: str, org_id: UUID) -> Iterable[Row]:
        for total in self._ledger.databases(org_id):
            yield (
                total.database,
                total.database_type,
                total.first_at,
                total.queries,
                total.refused,
                total.errors,
                total.rows,
                total.bytes_in,
                total.bytes_out,
                total.server_seconds,
                total.queue_seconds,
                total.throttled_seconds,
                total.vcpu_seconds,
                total.memory_gib_seconds,
            )

    def _tell_pins(self, handle: str, org_id: UUID) -> Iterable[Row]:
        for each in self._members.get(handle, ()):
            if each.pins:
                assert each.pinned_at is not None
                yield (
                    each.session.process_id,
                    each.session.database,
                    text(each.session.application_name).decode(),
                    ", ".join(each.pins),
                    each.pinned_at.timestamp(),
                )

    def _tell_slow(self, handle: str, org_id: UUID) -> Iterable[Row]:
        # More than are shown: what is slow in one may be quick in another.
        for total in self._ledger.slowest(org_id, MAX_STATEMENTS):
            failed_at = total.last_at if total.sqlstate else 0.0
            yield (
                f"{total.fingerprint:016x}",
                total.database,
                total.queries,
                total.errors,
                total.server_seconds,
                total.rows,
                total.longest_seconds,
                total.last_at,
                [failed_at, total.sqlstate],
            )

    # What is shown.

    def _help(self, client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
        return [(f"SHOW o7s.{name}", view.about) for name, view in self._views.items()]

    def _whoami(self, client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
        session, target = client.session, client.pool.target
        names = {key.id: key.name for key in tenant.keys}
        yield (
            tenant.handle,
            tenant.name,
            tenant.tier.name,
            None if session.key_id is None else str(session.key_id),
            names.get(session.key_id),
            session.database,
            str(target.type),
            str(target.pool_mode),
            session.process_id,
            session.connected_at,
            session.address or None,
            None if client.tls is None else client.tls.version(),
            session.protocol,
            session.application_name,
        )

    def _limits(self, client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
        bucket = client.bucket
        for _, tokens, admitted, refused, in_flight, connections in told:
            yield (
                tenant.tier.name,
                str(tenant.limiter_mode),
                bucket.rate,
                bucket.capacity,
                min(tokens, bucket.capacity),
                bucket.max_wait,
                admitted,
                refused,
                connections,
                tenant.max_connections,
                in_flight,
                tenant.tier.max_in_flight if client.flights.most else None,
            )


def _by_name(told: list[Row]) -> list[Row]:
    return sorted(told, key=lambda row: (row[0], row[1]))


def _usage(client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
    for name, kind, since, *counts, vcpu_seconds, memory_seconds in _by_name(told):
        moment = datetime.fromtimestamp(since, UTC)
        yield (name, kind, moment, *counts, vcpu_seconds / 3600, memory_seconds / 3600)


def _pins(client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
    for *pin, since in told:
        yield (*pin, datetime.fromtimestamp(since, UTC))


def _slow(client: Client, tenant: Tenant, told: list[Row]) -> Iterable[Row]:
    slowest = heapq.nlargest(SLOW_COUNT, told, key=lambda row: row[6])
    for fingerprint, database, queries, errors, total, rows, *latest in slowest:
        longest, last_at, (_, sqlstate) = latest
        yield (
            fingerprint,
            database,
            queries,
            errors,
            sqlstate or None,
            total / max(queries, 1),
            longest,
            total,
            rows,
            datetime.fromtimestamp(last_at, UTC),
        )


class Views:
    """The statements on views that one client has prepared."""

    def __init__(self, console: TenantConsole) -> None:
        self._console = console
        self._portals = Portals[View]()
        # For the message that the client waits with.
        self._told: Told | None = None
        self._is_asking = False

    def __len__(self) -> int:
        return len(self._portals)

    def takes(self, kind: str, body: bytes) -> bool:
        """Whether the message is about a view. Raises ProtocolViolation.

        One that is not may give a name of ours to something else.
        """
        portals = self._portals
        if kind in "PB" and body.count(b"\0") < 2:
            raise ProtocolViolation("a name is not terminated")
        match kind:
            case "Q":
                return self._console.find(body[:-1]) is not None
            case "P":
                name, text, _ = body.split(b"\0", 2)
                if self._console.find(text) is not None:
                    return True
                portals.forget_statement(name)
            case "B":
                portal, name, _ = body.split(b"\0", 2)
                if portals.has_statement(name):
                    return True
                portals.forget_portal(portal)
            case "E":
                return portals.has_portal(body.partition(b"\0")[0])
            case "D" | "C":
                has = portals.has_portal if body[:1] == b"P" else portals.has_statement
                return has(body[1:-1])
        return False

    def answer(self, client: Client, kind: str, body: bytes) -> bytes | None:
        """Answer a message that it takes: with messages, or with one error.

        None while others are asked; the client is told to carry on then.
        """
        try:
            return self._answer(client, kind, body)
        except Refused as refusal:
            return refusal.message

    def _answer(self, client: Client, kind: str, body: bytes) -> bytes | None:
        console, portals = self._console, self._portals
        match kind:
            case "Q":
                view = console.find(body[:-1])
                assert view is not None
                result = self._result(view, client)
                if result is None:
                    return None
                table = render(view.columns, result.rows)
                return _noticed(result) + table + complete(result.tag)
            case "P":
                name, text, _ = body.split(b"\0", 2)
                view = console.find(text)
                assert view is not None
                return portals.parse(name, view)
            case "B":
                return portals.bind(body)
            case "D":
                return portals.describe(body)
            case "C":
                return portals.close(body)
        portal, limit = portals.execute(body)
        if portal.result is not None:
            return portal.fetch(portal.result, limit)
        portal.result = result = self._result(portal.statement, client)
        if result is None:
            return None
        return _noticed(result) + portal.fetch(result, limit)

    def _result(self, view: View, client: Client) -> Result | None:
        """Make what a view shows; None while others are asked. Raises Refused."""
        console, tenant = self._console, self._console.tenant_of(client)
        told = console.tell(view, tenant)
        if told is None:
            told, self._told = self._told, None
        if told is None:
            if not self._is_asking:
                self._is_asking = True
                console.spawn(self._ask(view, tenant, client))
            return None
        rows = told.rows
        if view.rules is not None:
            rows = summed(rows, view.rules, view.key)
        notices = [f"not counted: {each}" for each in told.silent]
        return Result(iter(view.show(client, tenant, rows)), "SHOW", notices)

    async def _ask(self, view: View, tenant: Tenant, client: Client) -> None:
        self._told = Told([], ["all workers"])  # should it fail
        try:
            self._told = await self._console.gather(view, tenant)
        finally:
            self._is_asking = False
            client.carry_on()


def _noticed(result: Result) -> bytes:
    return b"".join(map(messages.plain_notice, result.notices))


HELP = (Column("statement"), Column("shows"))
WHOAMI = (
    Column("organisation"),
    Column("name"),
    Column("tier"),
    Column("key_id"),
    Column("key_name"),
    Column("database"),
    Column("database_type"),
    Column("pool_mode"),
    Column("connection_id", Type.INT8),
    Column("connected_at", Type.TIMESTAMPTZ),
    Column("address"),
    Column("tls"),
    Column("protocol"),
    Column("application_name"),
)
LIMITS = (
    Column("tier"),
    Column("mode"),
    Column("queries_per_second", Type.FLOAT8),
    Column("burst", Type.FLOAT8),
    Column("tokens", Type.FLOAT8),
    Column("max_wait", Type.FLOAT8),
    Column("admitted", Type.INT8),
    Column("refused", Type.INT8),
    Column("connections", Type.INT4),
    Column("max_connections", Type.INT4),
    Column("in_flight", Type.INT4),
    Column("max_in_flight", Type.INT4),
)
USAGE = (
    Column("database"),
    Column("database_type"),
    Column("since", Type.TIMESTAMPTZ),
    Column("queries", Type.INT8),
    Column("refused", Type.INT8),
    Column("errors", Type.INT8),
    Column("rows", Type.INT8),
    Column("bytes_in", Type.INT8),
    Column("bytes_out", Type.INT8),
    Column("server_seconds", Type.FLOAT8),
    Column("queue_seconds", Type.FLOAT8),
    Column("throttled_seconds", Type.FLOAT8),
    Column("vcpu_hours", Type.FLOAT8),
    Column("memory_gb_hours", Type.FLOAT8),
)
PINS = (
    Column("connection_id", Type.INT8),
    Column("database"),
    Column("application_name"),
    Column("reasons"),
    Column("since", Type.TIMESTAMPTZ),
)
SLOW = (
    Column("fingerprint"),
    Column("database"),
    Column("queries", Type.INT8),
    Column("errors", Type.INT8),
    Column("sqlstate"),
    Column("mean_seconds", Type.FLOAT8),
    Column("longest_seconds", Type.FLOAT8),
    Column("total_seconds", Type.FLOAT8),
    Column("rows", Type.INT8),
    Column("last_at", Type.TIMESTAMPTZ),
)
