"""Listen: the channels of one target, over one connection for all its clients.

The connection is opened at the first LISTEN and closed when nobody has listened
for a while. A client's LISTEN is answered once Postgres has answered ours, so that
no notification committed after that is missed. If the connection is lost, nobody
can know what was missed: who listened is ended, as Postgres would have ended it.
When a client may be told is `_listen`'s.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ogelproxy.console.portals import Portals, Refused, Result, complete
from ogelproxy.errors import (
    ListenerLost,
    ProtocolViolation,
    TargetUnreachable,
    TooManyNotifications,
)
from ogelproxy.protocol import messages
from ogelproxy.tenants.model import PoolMode

if TYPE_CHECKING:
    from ogelproxy.client import Client
    from ogelproxy.pool import Pool
    from ogelproxy.server import Server

log = logging.getLogger(__name__)

#: Channels that one client may listen to.
MAX_CHANNELS = 1000

#: Queries to Postgres that may wait for its answer.
MAX_OWED = 10_000

#: Seconds without a word after which the connection is asked whether it lives.
PING_INTERVAL = 30.0

#: What the connection is called in pg_stat_activity.
APPLICATION_NAME = "ogelproxy listen"

#: Bytes of an identifier that count (manual 4.1.1).
MAX_NAME_BYTES = 63

NAME = rb"[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*+|\"(?:[^\"\0]|\"\")++\""
BLANK = rb"(?>\s+|--[^\r\n]*|/\*(?s:(?!/\*).)*?\*/)"
#: LISTEN or UNLISTEN, alone in its text. Atomic groups, so that no text takes long
#: to refuse. What is written in another way (U&"…", nested comments) is not read.
STATEMENT = re.compile(
    rb"\s*(?P<verb>un)?listen"
    rb"(?:" + BLANK + rb"++|(?=[\"*]))"
    rb"(?P<name>" + NAME + rb"|\*)"
    rb"(?:" + BLANK + rb"|;)*+\Z",
    re.IGNORECASE,
)
#: What ends listening, wherever it stands in a query string.
ENDING = re.compile(
    rb"\b(?:unlisten\b\s*(?P<name>" + NAME + rb"|\*)|discard\s+all\b)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A LISTEN, or an UNLISTEN when `ends`; of all channels when `channel` is empty."""

    ends: bool
    channel: bytes  # folded, as it comes in notifications
    spelled: bytes  # as the client wrote it
    text: bytes

    #: It returns no rows.
    columns = None

    @property
    def tag(self) -> str:
        return "UNLISTEN" if self.ends else "LISTEN"


def parse(text: bytes) -> Statement | None:
    """Read a statement on a channel; None for any other text."""
    found = STATEMENT.match(text)
    if found is None:
        return None
    ends, spelled = found["verb"] is not None, found["name"]
    if spelled == b"*":
        return Statement(True, b"", spelled, text) if ends else None
    return Statement(ends, fold(spelled), spelled, text)


def fold(spelled: bytes) -> bytes:
    """Return the name that an identifier means (manual 4.1.1)."""
    if spelled.startswith(b'"'):
        name = spelled[1:-1].replace(b'""', b'"')
    else:
        name = spelled.lower()  # of ASCII letters only, as with a multi-byte encoding
    if len(name) > MAX_NAME_BYTES:
        name = name[:MAX_NAME_BYTES].decode("utf-8", "ignore").encode()
    return name


class Listens:
    """The statements on channels that one client has prepared, and runs."""

    def __init__(self, channels: Channels, client: Client) -> None:
        self._channels = channels
        self._client = client
        self._portals = Portals[Statement]()

    def __len__(self) -> int:
        return len(self._portals)

    def takes(self, kind: str, body: bytes) -> bool:
        """Whether the message is about a channel.

        One that is not may give a name of ours to something else.
        """
        portals = self._portals
        match kind:
            case "Q":
                return parse(body[:-1]) is not None
            case "P":
                name, text = _two(body)
                if parse(text) is not None:
                    return True
                portals.forget_statement(name)
            case "B":
                portal, name = _two(body)
                if portals.has_statement(name):
                    return True
                portals.forget_portal(portal)
            case "E":
                return portals.has_portal(body.partition(b"\0")[0])
            case "D" | "C":
                has = portals.has_portal if body[:1] == b"P" else portals.has_statement
                return has(body[1:-1])
        return False

    def statement(self, kind: str, body: bytes) -> Statement | None:
        """Return what a Query, a Parse or an Execute is about."""
        match kind:
            case "Q":
                return parse(body[:-1])
            case "P":
                return parse(_two(body)[1])
            case "E":
                return self._portals.execute(body)[0].statement
        return None

    def text(self, kind: str, body: bytes) -> bytes:
        """Return the SQL of a Query or an Execute."""
        found = self.statement(kind, body)
        return found.text if found is not None else b""

    def objection(self, kind: str, body: bytes, in_transaction: bool) -> bytes | None:
        """Return the ErrorResponse for what can't be done in this pool mode.

        A server of the pool's would forget what is listened to there.
        """
        found = self.statement(kind, body)
        if found is None or not (in_transaction or self._is_foreign):
            return None
        if kind != "E" and self._channels.is_auto and not self._listens_to(found):
            return None
        if not found.ends and self._listens_to(found):
            return None
        return self._channels.refusal

    @property
    def _is_foreign(self) -> bool:
        """Whether payloads would come in another encoding than the client's."""
        return self._channels.is_foreign(self._client)

    def passes(
        self, kind: str, body: bytes, has_server: bool, in_transaction: bool
    ) -> bool:
        """Whether a message goes to a server, as any other statement.

        In auto mode: to one that keeps session state for the client, or is in a
        transaction, or shall keep what is listened to.
        """
        found = self.statement(kind, body)
        if found is None or kind == "E" or not self._channels.is_auto:
            return False
        if not has_server:
            return self._is_foreign
        if found.ends and not in_transaction:
            self._channels.leave(self._client, found.channel)
            return True
        return not self._listens_to(found)

    def _listens_to(self, statement: Statement) -> bool:
        own = self._channels.of(self._client)
        return statement.channel in own if statement.channel else bool(own)

    def answer(self, kind: str, body: bytes) -> bytes | None:
        """Answer a message: None for not yet, then the client is to try again."""
        try:
            return self._answer(kind, body)
        except Refused as refusal:
            return refusal.message

    def _answer(self, kind: str, body: bytes) -> bytes | None:
        portals = self._portals
        match kind:
            case "P":
                statement = parse(_two(body)[1])
                assert statement is not None
                return portals.parse(_two(body)[0], statement)
            case "B":
                return portals.bind(body)
            case "D":
                return portals.describe(body)
            case "C":
                return portals.close(body)
            case "Q":
                statement = parse(body[:-1])
                assert statement is not None
                return complete(statement.tag) if self._run(statement) else None
        portal, limit = portals.execute(body)
        if portal.result is None:
            if not self._run(portal.statement):
                return None
            portal.result = Result(iter(()), portal.statement.tag)
        return portal.fetch(portal.result, limit)

    def _run(self, statement: Statement) -> bool:
        """Run a statement; False when it has to wait. Raises Refused."""
        if statement.ends:
            self._channels.leave(self._client, statement.channel)
            return True
        return self._channels.join(self._client, statement)


def _two(body: bytes) -> tuple[bytes, bytes]:
    """The first two strings of a message."""
    parts = body.split(b"\0", 2)
    return parts[0], parts[1] if len(parts) > 1 else b""


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """A query of ours on the connection."""

    message: bytes
    channel: bytes = b""  # empty for a ping
    client: Client | None = None  # who wants to listen


def _plain(encoding: str) -> str:
    name = re.sub("[^a-z0-9]", "", encoding.lower())
    return "utf8" if name == "unicode" else name


class Channels:
    """Who of a pool's clients listens to what, and the connection that does."""

    def __init__(self, pool: Pool) -> None:
        self.is_auto = pool.target.pool_mode is PoolMode.AUTO
        self.refusal = pool.host.listen_refused
        self.told_count = 0  # notifications given to clients, ever
        self._pool = pool
        self._members: dict[bytes, dict[Client, None]] = {}  # by channel
        self._own: dict[Client, set[bytes]] = {}  # channels, by client
        self._waits: dict[Client, Command] = {}  # until it joins
        self._granted: set[Client] = set()  # those of them that may join
        self._listened: set[bytes] = set()  # what Postgres was last told to listen to
        self._owed: deque[Command] = deque()  # not answered
        self._owed_since = 0.0  # when the oldest of them became the oldest
        self._error: bytes | None = None  # that the oldest of them met
        self._task_runs = False
        self._server: Server | None = None  # logged in, and not closed by us
        self._heard_at = 0.0
        self._used_at = 0.0  # when somebody last listened

    @property
    def clients(self) -> Collection[Client]:
        """The clients that listen."""
        return self._own.keys()

    @property
    def count(self) -> int:
        """How many channels have members."""
        return len(self._members)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, or one is being made."""
        return self._task_runs

    def is_foreign(self, client: Client) -> bool:
        """Whether a client reads another encoding than the connection's.

        Names of encodings as Postgres compares them (manual 23.3.1).
        """
        asked = client.encoding
        return asked is not None and _plain(asked) != _plain(self._pool.encoding)

    def open(self, client: Client) -> Listens:
        """Make what answers one client."""
        return Listens(self, client)

    def of(self, client: Client) -> Set[bytes]:
        """The channels that a client listens to."""
        return self._own.get(client, frozenset())

    # Members.

    def join(self, client: Client, statement: Statement) -> bool:
        """Have a client listen; False if it has to wait. Raises Refused.

        One that waits is tried again when it may join, or its request is refused.
        Each waits for an answer of Postgres to a LISTEN of its own: what was
        notified before that comes before it, and so isn't for this client.
        """
        channel, own = statement.channel, self.of(client)
        if channel in own:
            return True
        if len(own) >= MAX_CHANNELS:
            raise Refused("54000", f"more than {MAX_CHANNELS} channels")
        waits = self._waits.get(client)
        if waits is None or waits.channel != channel:
            if len(self._owed) >= MAX_OWED:
                raise Refused("53400", "too many LISTEN wait for the database")
            sql = b"LISTEN " + statement.spelled
            self._granted.discard(client)
            self._listened.add(channel)
            self._waits[client] = self._command(sql, channel, client)
            return False
        if client not in self._granted:
            return False
        self._forget_wait(client)
        self._members.setdefault(channel, {})[client] = None
        self._own.setdefault(client, set()).add(channel)
        client.is_listening = True
        return True

    def leave(self, client: Client, channel: bytes = b"") -> None:
        """Have a client listen no more to a channel, or to any."""
        own = self._own.get(client)
        if own is None:
            return
        for name in {channel} & own if channel else set(own):
            own.discard(name)
            members = self._members[name]
            del members[client]
            if not members:
                del self._members[name]
                self._unlisten({name})
        if not own:
            del self._own[client]
            client.is_listening = False
            self._used_at = self._now

    def forget(self, client: Client, text: bytes) -> None:
        """Have a client listen no more to what a query string says.

        At once, whatever becomes of the rest of it.
        """
        for found in ENDING.finditer(text):
            name = found["name"] or b"*"
            self.leave(client, b"" if name == b"*" else fold(name))

    def gone(self, client: Client) -> None:
        """Forget a client that is closed."""
        self.leave(client)
        self._forget_wait(client)

    def _forget_wait(self, client: Client) -> None:
        self._waits.pop(client, None)
        self._granted.discard(client)

    def _unlisten(self, channels: Set[bytes]) -> None:
        """Listen no more to those of `channels` that nobody needs."""
        wanted = {command.channel for command in self._waits.values()}
        for channel in (channels & self._listened) - self._members.keys() - wanted:
            self._listened.discard(channel)
            self._command(b'UNLISTEN "' + channel.replace(b'"', b'""') + b'"', channel)

    # The connection.

    @property
    def _now(self) -> float:
        return self._pool.host.reactor.loop.time()

    def _command(
        self, sql: bytes, channel: bytes = b"", client: Client | None = None
    ) -> Command:
        command = Command(messages.message(b"Q", sql + b"\0"), channel, client)
        if not self._owed:
            self._owed_since = self._now
        self._owed.append(command)
        if self._server is not None:
            self._server.send(command.message)
        elif not self._task_runs:
            self._task_runs = True
            self._pool.host.spawn(self._run())
        return command

    async def _run(self) -> None:
        try:
            await self._listen()
        except TargetUnreachable as error:
            self._end(error)
        except (OSError, ProtocolViolation) as error:
            if self._server is not None:
                self._end(TargetUnreachable(f"listening connection: {error}"))
        finally:
            self._task_runs = False
            if self._server is not None:
                self._server.close()
                self._server = None
        if self._owed:
            # Asked for while the connection was being closed.
            self._task_runs = True
            self._pool.host.spawn(self._run())

    async def _listen(self) -> None:
        server = await self._pool.connect({"application_name": APPLICATION_NAME})
        self._server = server
        self._heard_at = self._used_at = self._owed_since = self._now
        server.send(b"".join(command.message for command in self._owed))
        while True:
            kind, body = await server.receive_message()
            self._heard_at = self._now
            if kind == b"A":
                self._tell(body)
            elif kind == b"E":
                self._error = body
            elif kind == b"Z":
                self._answered()

    def _tell(self, body: bytes) -> None:
        """Give a notification to the members of its channel (manual 55.7)."""
        limits = self._pool.host.config.client
        channel = body[4:].partition(b"\0")[0]
        message = messages.message(b"A", body)
        for client in list(self._members.get(channel, ())):
            if client.notify(
                message, limits.max_notifications, limits.max_notification_bytes
            ):
                self.told_count += 1
            else:
                self._pool.host.fail(client, TooManyNotifications())

    def _answered(self) -> None:
        """Postgres answered the oldest command."""
        if not self._owed:
            raise ProtocolViolation("unexpected ReadyForQuery", by="server")
        command, error = self._owed.popleft(), self._error
        self._owed_since = self._now
        self._error = None
        client = command.client
        if client is None or self._waits.get(client) is not command:
            return
        if error is not None or not client.waits_to_listen:
            # A client that was cancelled may be up to something else.
            self._forget_wait(client)
        if client.waits_to_listen and error is not None:
            client.give_up(messages.message(b"E", error))
        elif client.waits_to_listen:
            self._granted.add(client)
            client.retry()

    def _end(self, error: TargetUnreachable) -> None:
        """The connection is lost, or there was none to be had."""
        members, waiting = list(self._own), list(self._waits)
        if members:
            log.warning("%s", error, extra={"tenant": self._pool.handle})
        self._members, self._own = {}, {}
        self._waits = {}
        for known in (self._granted, self._listened, self._owed):
            known.clear()
        self._error = None
        for client in waiting:
            if client.waits_to_listen:
                client.give_up(self._pool.host.error(error))
        for client in members:
            client.is_listening = False
            self._pool.host.fail(client, ListenerLost())

    # Time.

    def sweep(self, now: float) -> None:
        """Close the connection when it is silent or nobody listens any more."""
        for client in self._own:
            client.tell()
        server = self._server
        if server is None:
            return
        # Who asked for a channel may have gone away before it was answered.
        self._unlisten(self._listened)
        config = self._pool.config
        if self._owed:
            if now - self._owed_since > config.connect_timeout:
                server.close()
        elif self._members:
            if now - self._heard_at > PING_INTERVAL:
                self._command(b"")
        elif 0 < config.server_idle_timeout < now - self._used_at:
            self.close()

    def close(self) -> None:
        """Close the connection if nobody needs it."""
        server = self._server
        if server is not None and not (self._members or self._waits):
            self._server = None
            self._listened.clear()
            self._owed.clear()
            server.send(messages.TERMINATE)
            server.close()
