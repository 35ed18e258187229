"""Operator: the database `ogel`, for operators' keys.

What PgBouncer's console tells and does, for its dashboards, and in the extended
protocol too. A console is no client: it takes no slot, no token and no server, and is
in no usage. The login is `login`'s; what is shown is `tables`', what is done
`commands`'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ogelproxy.config import Config
from ogelproxy.console.commands import Commands
from ogelproxy.console.portals import Portals, Refused, Result, complete, render
from ogelproxy.console.statements import Command, split, unknown
from ogelproxy.console.tables import ALIASES, SESSION, Tables
from ogelproxy.errors import (
    CredentialRejected,
    OgelError,
    ProtocolViolation,
    ServerBusy,
)
from ogelproxy.orders import Orders
from ogelproxy.protocol import messages
from ogelproxy.protocol.rows import Column, Type, Value
from ogelproxy.tenants.model import OPERATORS, Credential, Tenant

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.console.peers import Peers
    from ogelproxy.gate import Gate
    from ogelproxy.line import Line
    from ogelproxy.relay import Relay, Tenants
    from ogelproxy.router import Router
    from ogelproxy.traffic import TrafficBook
    from ogelproxy.usage.journal import Journal

log = logging.getLogger(__name__)

#: Database names that are the console; the second so that programs made for
#: PgBouncer need another host and key only.
DATABASES = (OPERATORS, "pgbouncer")
MAX_CONSOLES = 100
#: Seconds that the supervisor has to tell what was ordered.
ORDERS_TIMEOUT = 30.0

EMPTY = b"I\0\0\0\4"
#: What drivers read off ParameterStatus. The version is one they know how to speak to.
STATUSES = {
    "server_version": "17.0 (ogelproxy {version})",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "application_name": "",
    "DateStyle": SESSION["datestyle"],
    "IntervalStyle": "postgres",
    "TimeZone": SESSION["timezone"],
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "session_authorization": OPERATORS,
    "is_superuser": "off",
    "in_hot_standby": "off",
    "default_transaction_read_only": "off",
}
#: Statements that drivers send around those of people: their tags. What there is of
#: a session here, they leave as it is.
COURTESIES = {
    "BEGIN": "BEGIN",
    "START": "START TRANSACTION",
    "COMMIT": "COMMIT",
    "END": "COMMIT",
    "ROLLBACK": "ROLLBACK",
    "ABORT": "ROLLBACK",
    "RESET": "RESET",
    "DISCARD": "DISCARD ALL",
    "DEALLOCATE": "DEALLOCATE ALL",
    "CLOSE": "CLOSE CURSOR ALL",
    "UNLISTEN": "UNLISTEN",
}
OPENING, CLOSING = ("BEGIN", "START"), ("COMMIT", "END", "ROLLBACK", "ABORT")
#: Questions by which drivers and pools try a connection, and their answers.
QUESTIONS: dict[str, tuple[Column, Value]] = {
    "1": (Column("?column?", Type.INT4), 1),
    "pg_advisory_unlock_all()": (Column("pg_advisory_unlock_all"), ""),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What of an engine its console sees and touches."""

    config: Callable[[], Config]
    relay: Relay
    router: Router
    tenants: Tenants
    gate: Gate
    traffic: TrafficBook
    journal: Journal
    peers: Peers
    address: Callable[[], tuple[str, int] | None]  # where clients connect
    console_count: Callable[[], int]
    reload: Callable[[], Awaitable[None]]  # raises OgelError, OSError
    stop_accepting: Callable[[], None]
    stop: Callable[[], None]  # asks whoever runs the engine


@dataclass(frozen=True, slots=True)
class Statement:
    """A command with the columns of its rows; None when it returns none."""

    command: Command | None  # None for an empty query
    columns: Sequence[Column] | None = None


class OperatorConsole:
    """The consoles of one engine."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tables = Tables(parts)
        self._commands = Commands(parts, self._tables)
        self._sessions: dict[Client, tuple[UUID | None, asyncio.Task[None]]] = {}

    def __len__(self) -> int:
        """Return how many are open."""
        return len(self._sessions)

    def enter(self, client: Client, credential: Credential) -> None:
        """Open a console on a client that has proven to be an operator.

        Raises ServerBusy.
        """
        if len(self._sessions) >= MAX_CONSOLES:
            raise ServerBusy("too many consoles")
        client.send(_welcome())
        task = self._parts.relay.reactor.loop.create_task(self._run(client))
        self._sessions[client] = (credential.key_id, task)

    async def stop(self) -> None:
        """End all of them."""
        tasks = [task for _, task in self._sessions.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def update(self, operators: Tenant | None) -> None:
        """End the consoles whose key is no longer among the operators'."""
        live = set() if operators is None else {key.id for key in operators.keys}
        for client, (key_id, task) in self._sessions.items():
            if key_id not in live:
                error = CredentialRejected("the key was revoked")
                client.send(messages.error_response(error))
                task.cancel()

    async def follow(self, line: Line) -> None:
        """Do as operators told the other workers, and as they will from now on.

        Raises LineFailed, TimeoutError.
        """
        relay, router = self._parts.relay, self._parts.router

        def obey(dumped: Mapping[str, Any]) -> None:
            router.obey(Orders.load(dumped))

        def shut_down(mode: str) -> None:
            relay.spawn(self._commands.shut_down(mode))

        line.on("orders", obey)
        line.on("shutdown", shut_down)
        obey(await line.ask("orders", answer_timeout=ORDERS_TIMEOUT))

    async def _run(self, client: Client) -> None:
        try:
            await Session(client, self).run()
        except (OSError, asyncio.CancelledError):
            pass
        except OgelError as error:
            client.send(messages.error_response(error, is_fatal=True))
        except Exception as defect:
            log.error("console failed", exc_info=defect)
        finally:
            del self._sessions[client]
            client.close()

    def prepare(self, command: Command) -> Statement:
        """Find out what a command is. Raises Refused."""
        match command.verb:
            case "SHOW":
                if command.subject().lower() == "help":
                    return Statement(command, (Column("command"), Column("does")))
                table = self._tables.find(command.subject().lower())
                if table is None:
                    raise unknown(command)
                return Statement(command, table.columns)
            case "SELECT":
                found = QUESTIONS.get(command.subject().lower())
                if found is None:
                    raise unknown(command)
                return Statement(command, (found[0],))
            case "SET":
                self._check_setting(command)
                return Statement(command)
        if command.verb in COURTESIES or self._commands.knows(command.verb):
            return Statement(command)
        raise unknown(command)

    def _check_setting(self, command: Command) -> None:
        """Refuse to seem to change a setting of the proxy."""
        name = command.words[0].lower() if command.words else ""
        if name in Config.settings() or name in ALIASES:
            raise Refused(
                "0A000",
                "settings can't be set in the console",
                "change the file and use RELOAD",
            )

    async def execute(self, command: Command, is_gone: Callable[[], bool]) -> Result:
        """Run a prepared command. Raises Refused."""
        subject = command.words[0].lower() if command.words else ""
        match command.verb:
            case "SHOW":
                if subject == "help":
                    return Result(iter(self._help()), "SHOW")
                rows, silent = await self._tables.rows(subject)
                notices = [f"not told: {each}" for each in silent]
                return Result(iter(rows), "SHOW", notices)
            case "SELECT":
                return Result(iter([(QUESTIONS[subject][1],)]), "SELECT 1")
            case "SET":
                return Result(iter(()), "SET")
        if command.verb in COURTESIES:
            return Result(iter(()), COURTESIES[command.verb])
        await self._commands.run(command, is_gone)
        return Result(iter(()), command.verb)

    async def audit(self, client: Client, command: Command) -> None:
        """Record who gave a command, before it does anything."""
        if not self._commands.knows(command.verb):
            return
        key_id, _ = self._sessions[client]
        operators = self._parts.tenants.peek(OPERATORS)
        keys = operators.keys if operators is not None else ()
        names = [key.name for key in keys if key.id == key_id]
        tenant = self._parts.tenants.peek(command.subject().partition("/")[0])
        await self._parts.journal.record(
            f"operator:{names[0] if names else key_id}",
            f"console.{command.verb.lower()}",
            tenant.id if tenant is not None else None,
            command=" ".join((command.verb, *command.words)),
            key=str(key_id),
            address=client.address,
        )

    def _help(self) -> Iterable[Sequence[Value]]:
        names = "|".join(name.upper() for name in self._tables.names)
        return [(f"SHOW {names}", "tell of the proxy"), *self._commands.forms]


class Session:
    """One console: its protocol, simple and extended (manual 55.2.2, 55.2.3)."""

    def __init__(self, client: Client, console: OperatorConsole) -> None:
        self._client = client
        self._console = console
        self._portals = Portals[Statement]()
        self._is_in_transaction = False
        self._is_skipping = False  # a failed batch, up to its Sync

    async def run(self) -> None:
        """Answer until the operator leaves.

        Raises ConnectionResetError when the connection is lost.
        """
        while True:
            kind, body = await self._client.receive_message()
            match kind:
                case b"X":
                    return
                case b"Q":
                    self._send(await self._query(body), self._ready())
                case b"S":
                    self._is_skipping = False
                    self._send(self._ready())
                case b"P" | b"B" | b"D" | b"E" | b"C":
                    if not self._is_skipping:
                        self._send(await self._extended(kind, body))
                case b"H" | b"d" | b"c" | b"f":
                    pass
                case _:
                    raise ProtocolViolation(f"unexpected message {kind!r}")
            await self._client.drained()

    def _send(self, *answers: bytes) -> None:
        self._client.send(b"".join(answers))

    def _ready(self) -> bytes:
        return b"Z\0\0\0\5" + (b"T" if self._is_in_transaction else b"I")

    async def _query(self, body: bytes) -> bytes:
        self._portals.forget_portals()
        answers: list[bytes] = []
        try:
            commands = split(body[:-1].decode("utf-8", "replace"))
            for command in commands:
                statement = self._console.prepare(command)
                result = await self._execute(command)
                answers += map(messages.plain_notice, result.notices)
                if statement.columns is not None:
                    answers.append(render(statement.columns, result.rows))
                answers.append(complete(result.tag))
        except Refused as refusal:
            return b"".join(answers) + refusal.message
        return b"".join(answers) if commands else EMPTY

    async def _execute(self, command: Command) -> Result:
        client = self._client
        await self._console.audit(client, command)
        result = await self._console.execute(command, lambda: client.is_broken)
        if command.verb in OPENING:
            self._is_in_transaction = True
        elif command.verb in CLOSING:
            self._is_in_transaction = False
        elif command.verb in ("DISCARD", "DEALLOCATE"):
            self._portals.clear()
        return result

    async def _extended(self, kind: bytes, body: bytes) -> bytes:
        portals = self._portals
        try:
            match kind:
                case b"P":
                    return self._parse(body)
                case b"B":
                    if body.count(b"\0") < 2:
                        raise ProtocolViolation("a name is not terminated")
                    return portals.bind(body)
                case b"D":
                    return portals.describe(body)
                case b"C":
                    return portals.close(body)
            portal, limit = portals.execute(body)
            command = portal.statement.command
            if command is None:
                return EMPTY
            if portal.result is None:
                portal.result = await self._execute(command)
                notices = map(messages.plain_notice, portal.result.notices)
                return b"".join(notices) + portal.fetch(portal.result, limit)
            return portal.fetch(portal.result, limit)
        except Refused as refusal:
            self._is_skipping = True
            return refusal.message

    def _parse(self, body: bytes) -> bytes:
        if body.count(b"\0") < 2:
            raise ProtocolViolation("a name is not terminated")
        name, text, _ = body.split(b"\0", 2)
        commands = split(text.decode("utf-8", "replace"))
        if len(commands) > 1:
            raise Refused(
                "42601", "cannot insert multiple commands into a prepared statement"
            )
        statement = self._console.prepare(commands[0]) if commands else Statement(None)
        return self._portals.parse(name, statement)


def _welcome() -> bytes:
    statuses = b"".join(
        messages.parameter_status(name, value.format(version=version("ogelproxy")))
        for name, value in STATUSES.items()
    )
    # Nothing here can be cancelled: the key is nobody's.
    key = messages.backend_key_data(0, b"\0\0\0\0")
    return messages.AUTHENTICATION_OK + statuses + key + messages.READY_IDLE
