"""Nothing of one tenant reaches another, nothing of one session the next.

A machine of random steps: clients of two organisations, on few servers, put
canaries wherever Postgres keeps something and look at what they find. A canary
names its organisation and, where it is of a session, its client. Nobody may ever
see another's; whether one's own is still there hangs on the pool mode and is no
matter here. The same machine must catch proxies that leak.
"""

from __future__ import annotations

import re
from typing import ClassVar, NoReturn

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.wire import (
    SYNC,
    Message,
    Wire,
    bind,
    close_statement,
    execute,
    parse,
    query,
)

#: Clients of each organisation at most, and its servers. In auto mode each client
#: may come to keep one; those that don't still share the one used last.
CLIENTS = 5
SERVERS = {PoolMode.TRANSACTION: 2, PoolMode.AUTO: CLIENTS}

CANARY = re.compile(rb"canary_([a-z]+)_(\d+)_")
COLORS = ("red", "blue")
NAMES = ("", "a", "b")


class Bled(AssertionError):
    """A client has seen what is not its own."""


class Client:
    """One session, and what it hears."""

    _count = 0

    def __init__(
        self, organization: Organization, color: str, mode: PoolMode, bled: list[str]
    ) -> None:
        self._bled = bled
        Client._count += 1
        self.color = color
        self.number = Client._count
        self.canary = f"canary_{color}_{self.number}_"
        self.has_listened = False
        self.has_role = False
        self.wire = Wire(organization.dsn(str(mode)))
        told = str(self.wire.statuses).encode()
        self.check("start-up", [Message("S", told)], of_session=True)

    def __repr__(self) -> str:
        return self.canary

    def run(self, what: str, *messages: bytes, of_session: bool = True) -> None:
        self.check(what, self.wire.ask(*messages), of_session=of_session)

    def check(self, what: str, got: list[Message], *, of_session: bool) -> None:
        """Raise Bled where an answer holds a canary of somebody else's."""
        for each in got:
            is_session = of_session and each.kind != "A"
            if each.kind == "A" and not self.has_listened:
                self.bleed(f"never listened, and hears {each.body!r}")
            for color, number in CANARY.findall(each.body):
                if color.decode() != self.color or (
                    is_session and int(number) != self.number
                ):
                    self.bleed(f"{what}: sees {each.body!r}")

    def bleed(self, what: str) -> NoReturn:
        self._bled.append(f"{self.canary}: {what}")
        raise Bled(self._bled[-1])


#: A proxy that looks up databases by their name alone.
ONE_TARGET_FOR_ALL = """
from ogelproxy import cli
from ogelproxy.router import Router

targets = {}
honest = Router.route

def route(self, tenant, database):
    return targets.setdefault(database, honest(self, tenant, database))

Router.route = route
cli.main()
"""

#: State of a session: how a client makes it, with its canary or a lock of its own
#: number, and how it looks for any.
STATES: dict[str, tuple[str, str]] = {
    "setting": (
        "SELECT set_config('my.canary', '{canary}', false)",
        "SELECT current_setting('my.canary', true)",
    ),
    "setting by SET": ("SET my.other = '{canary}'", "SHOW my.other"),
    "application name": (
        "SET application_name = '{canary}'",
        "SHOW application_name",
    ),
    "search path": ("SET search_path = {canary}, public", "SHOW search_path"),
    "temporary table": (
        "CREATE TEMP TABLE IF NOT EXISTS shelter AS SELECT '{canary}'::text AS c",
        "SELECT c FROM shelter",
    ),
    "statement of SQL": (
        "DEALLOCATE ALL; PREPARE told AS SELECT '{canary}'",
        "EXECUTE told",
    ),
    "cursor": (
        "CLOSE ALL; DECLARE walk SCROLL CURSOR WITH HOLD FOR SELECT '{canary}'",
        "FETCH FIRST FROM walk",
    ),
    "lock": (
        "SELECT pg_try_advisory_lock(7, {number})",
        "SELECT 'canary_{color}_' || objid || '_' FROM pg_locks"
        " WHERE locktype = 'advisory' AND classid = 7 AND pid = pg_backend_pid()",
    ),
    "channel": (
        "LISTEN {canary}",
        "SELECT pg_listening_channels()",
    ),
}


class Machine(RuleBasedStateMachine):
    """Clients that come, leave traces, look for others' and go."""

    organizations: ClassVar[dict[str, Organization]]
    mode: ClassVar[PoolMode]
    #: What clients have seen that is not their own.
    bled: ClassVar[list[str]]

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []

    def teardown(self) -> None:
        try:
            for client in self.clients:
                for _, look in STATES.values():
                    client.run("at the end", query(look))
        finally:
            for client in self.clients:
                client.wire.sock.close()

    def one(self, data: st.DataObject) -> Client:
        return data.draw(st.sampled_from(self.clients))

    @rule(color=st.sampled_from(COLORS))
    def come(self, color: str) -> None:
        if sum(each.color == color for each in self.clients) < CLIENTS:
            client = Client(self.organizations[color], color, self.mode, self.bled)
            self.clients.append(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), last=st.sampled_from(["", "goodbye", "transaction", "batch"]))
    def go(self, data: st.DataObject, last: str) -> None:
        client = self.one(data)
        if last == "goodbye":
            client.wire.send(b"X\0\0\0\4")
        elif last == "transaction":
            client.run(last, query(f"BEGIN; SET LOCAL my.canary = '{client.canary}'"))
        elif last == "batch":
            client.wire.send(parse(f"SELECT '{client.canary}'", "a") + bind((), "a"))
        client.wire.sock.close()
        self.clients.remove(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), state=st.sampled_from(sorted(STATES)))
    def make(self, data: st.DataObject, state: str) -> None:
        client = self.one(data)
        client.has_listened = client.has_listened or state == "channel"
        make = STATES[state][0].format(
            canary=client.canary, color=client.color, number=client.number
        )
        client.run(f"making a {state}", query(make))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), state=st.sampled_from(sorted(STATES)))
    def look(self, data: st.DataObject, state: str) -> None:
        client = self.one(data)
        look = STATES[state][1].format(color=client.color)
        client.run(f"looking for a {state}", query(look))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), is_made=st.booleans())
    def role(self, data: st.DataObject, is_made: bool) -> None:
        client = self.one(data)
        if is_made:
            client.has_role = True
            client.run("making a role", query("SET ROLE pg_monitor"))
        got = client.wire.ask(query("SELECT current_user"))
        if any(b"pg_monitor" in each.body for each in got) and not client.has_role:
            client.bleed("has another's role")

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def prepare(self, data: st.DataObject, name: str) -> None:
        client = self.one(data)
        client.run(
            f"preparing {name}",
            close_statement(name),
            parse(f"SELECT '{client.canary}', '{name}'", name),
            SYNC,
        )

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def run_prepared(self, data: st.DataObject, name: str) -> None:
        client = self.one(data)
        client.run(f"running {name}", bind((), name), execute(), SYNC)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def rows(self, data: st.DataObject) -> None:
        client = self.one(data)
        client.run("insert", query(f"INSERT INTO guest VALUES ('{client.canary}')"))
        client.run("rows", query("SELECT * FROM guest LIMIT 100"), of_session=False)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def notice(self, data: st.DataObject) -> None:
        client = self.one(data)
        client.run("notice", query(f"DO $$ BEGIN RAISE '{client.canary}'; END $$"))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def listen(self, data: st.DataObject) -> None:
        client = self.one(data)
        client.has_listened = True
        client.run("listen", query("LISTEN all_of_us"))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def notify(self, data: st.DataObject) -> None:
        client = self.one(data)
        client.run("notify", query(f"NOTIFY all_of_us, '{client.canary}'"))
        for other in self.clients:
            other.run("hear", query("SELECT 1"))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), end=st.sampled_from(["COMMIT", "ROLLBACK"]))
    def transact(self, data: st.DataObject, end: str) -> None:
        """A transaction amid those of others."""
        client = self.one(data)
        canary = client.canary
        client.run("begin", query(f"BEGIN; SET LOCAL my.canary = '{canary}'"))
        others = [each for each in self.clients if each is not client]
        for other in others[:2]:
            other.run("beside", query("SHOW my.canary"))
            other.run("rows", query("SELECT * FROM guest"), of_session=False)
        client.run("amid", query("SHOW my.canary"))
        client.run("end", query(end))

    @precondition(lambda self: len(self.clients) > 1)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Everybody else cancels what they have not asked for."""
        client = self.one(data)
        client.wire.send(query(f"SELECT pg_sleep(0.01), '{client.canary}'"))
        for other in self.clients:
            if other is not client:
                other.wire.cancel()
        got = client.wire.until("Z")
        client.check("cancel", got, of_session=True)
        if any(each.kind == "E" and each.fields()["C"] == "57014" for each in got):
            client.bleed("was cancelled by another")

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        self.one(data).run("discard", query("DISCARD ALL"))


def machine(proxy: Proxy, mode_: PoolMode) -> type[Machine]:
    """The machine for two new organisations of a running proxy."""
    made = {}
    for color in COLORS:
        made[color] = proxy.create_organization(limiter=LimiterMode.OFF, modes=[mode_])
        with psycopg.connect(made[color].direct_dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE guest (canary text)")
            role = connection.info.user
        proxy.postgres.execute(
            sql.SQL("GRANT pg_monitor TO {}").format(sql.Identifier(role))
        )

    class Running(Machine):
        organizations = made
        mode = mode_
        bled: ClassVar[list[str]] = []

    return Running


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        # Which server comes next is for chance to say: a smaller example might
        # not fail again.
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def run(proxy: Proxy, mode: PoolMode, examples: int) -> list[str]:
    """Run the machine; return what has bled."""
    proxy.settings["OGELPROXY_POOL_MAX_SERVERS"] = str(SERVERS[mode])
    made = machine(proxy, mode)
    proxy.start()
    try:
        run_state_machine_as_test(made, settings=profile(examples))
    except (Bled, Flaky):
        # The steps that fail are run again, and need not fail on other servers.
        if not made.bled:
            raise
    return made.bled


@pytest.mark.parametrize("mode", SERVERS)
def test_nobody_sees_a_canary_of_somebody_else(
    own_proxy: Proxy, mode: PoolMode
) -> None:
    assert run(own_proxy, mode, 25) == []


def test_a_proxy_that_resets_nothing_is_caught(own_proxy: Proxy) -> None:
    own_proxy.settings["OGELPROXY_POOL_RESET_QUERY"] = "SELECT 1"
    assert run(own_proxy, PoolMode.TRANSACTION, 100)


def test_a_proxy_that_takes_one_organization_for_another_is_caught(
    own_proxy: Proxy,
) -> None:
    own_proxy.program = ["-c", ONE_TARGET_FOR_ALL]
    assert run(own_proxy, PoolMode.TRANSACTION, 100)
