"""Tenant: what a tenant may ask about itself on its own connection.

`SHOW o7s.whoami` and the like, in any database and pool mode, without a server, a
token or usage. Every view is of the asking client's organisation, and no other's
rows are looked at. How the messages reach this place is `_views`'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ogelproxy.console.portals import Portals, Refused, Result, complete, render
from ogelproxy.errors import ProtocolViolation
from ogelproxy.protocol.rows import Column, Type, Value

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.gate import Gate
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

Row = Sequence[Value]


@dataclass(frozen=True, slots=True)
class View:
    """One of the things that may be shown, and how its rows are made."""

    about: str
    columns: tuple[Column, ...]
    rows: Callable[[Client, Tenant], Iterable[Row]]


class TenantConsole:
    """The views of one engine's tenants."""

    def __init__(
        self,
        *,
        tenants: Tenants,
        gate: Gate,
        ledger: Ledger,
        members: Mapping[str, Iterable[Client]],
        clock: Callable[[], float],
    ) -> None:
        self._tenants = tenants
        self._gate = gate
        self._ledger = ledger
        self._members = members  # the clients of each organisation
        self._clock = clock
        self._views = {
            "help": View("what there is to show", HELP, self._help),
            "whoami": View("this connection", WHOAMI, self._whoami),
            "limits": View(
                "what the tier allows, and what is left", LIMITS, self._limits
            ),
            "usage": View("today's use (UTC) of each database", USAGE, self._usage),
            "pins": View("connections that keep their server", PINS, self._pins),
            "slow": View("today's slowest statements", SLOW, self._slow),
        }

    def find(self, text: bytes) -> View | None:
        """Return the view that a statement shows; None for any other statement."""
        found = STATEMENT.match(text)
        return self._views.get(found[1].decode().lower()) if found else None

    def rows(self, view: View, client: Client) -> Iterable[Row]:
        """Make the rows that `client` may see. Raises Refused."""
        tenant = self._tenants.peek(client.session.handle)
        if tenant is None:
            raise Refused("57P03", "the organisation's record is not at hand")
        return view.rows(client, tenant)

    def open(self) -> Views:
        """Make what answers one client."""
        return Views(self)

    def _help(self, client: Client, tenant: Tenant) -> Iterable[Row]:
        return [(f"SHOW o7s.{name}", view.about) for name, view in self._views.items()]

    def _whoami(self, client: Client, tenant: Tenant) -> Iterable[Row]:
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

    def _limits(self, client: Client, tenant: Tenant) -> Iterable[Row]:
        bucket = client.bucket
        grown = bucket.level + bucket.rate * max(self._clock() - bucket.stamp, 0.0)
        yield (
            tenant.tier.name,
            str(tenant.limiter_mode),
            bucket.rate,
            bucket.capacity,
            min(grown, bucket.capacity),
            bucket.max_wait,
            bucket.admitted,
            sum(total.refused for total in self._ledger.databases(tenant.id)),
            self._gate.total(tenant.handle),
            tenant.max_connections,
            client.flights.count,
            client.flights.most or None,
        )

    def _usage(self, client: Client, tenant: Tenant) -> Iterable[Row]:
        for total in self._ledger.databases(tenant.id):
            yield (
                total.database,
                total.database_type,
                datetime.fromtimestamp(total.first_at, UTC),
                total.queries,
                total.refused,
                total.errors,
                total.rows,
                total.bytes_in,
                total.bytes_out,
                total.server_seconds,
                total.queue_seconds,
                total.throttled_seconds,
                total.vcpu_seconds / 3600,
                total.memory_gib_seconds / 3600,
            )

    def _pins(self, client: Client, tenant: Tenant) -> Iterable[Row]:
        for each in self._members.get(tenant.handle, ()):
            if each.pins:
                yield (
                    each.session.process_id,
                    each.session.database,
                    each.session.application_name,
                    ", ".join(each.pins),
                    each.pinned_at,
                )

    def _slow(self, client: Client, tenant: Tenant) -> Iterable[Row]:
        for total in self._ledger.slowest(tenant.id, SLOW_COUNT):
            yield (
                f"{total.fingerprint:016x}",
                total.database,
                total.queries,
                total.errors,
                total.sqlstate or None,
                total.server_seconds / max(total.queries, 1),
                total.longest_seconds,
                total.server_seconds,
                total.rows,
                datetime.fromtimestamp(total.last_at, UTC),
            )


class Views:
    """The statements on views that one client has prepared."""

    def __init__(self, console: TenantConsole) -> None:
        self._console = console
        self._portals = Portals[View]()

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

    def answer(self, client: Client, kind: str, body: bytes) -> bytes:
        """Answer a message that it takes: with messages, or with one error."""
        try:
            return self._answer(client, kind, body)
        except Refused as refusal:
            return refusal.message

    def _answer(self, client: Client, kind: str, body: bytes) -> bytes:
        console, portals = self._console, self._portals
        match kind:
            case "Q":
                view = console.find(body[:-1])
                assert view is not None
                rows = console.rows(view, client)
                return render(view.columns, rows) + complete("SHOW")
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
        if portal.result is None:
            rows = console.rows(portal.statement, client)
            portal.result = Result(iter(rows), "SHOW")
        return portal.fetch(portal.result, limit)


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
