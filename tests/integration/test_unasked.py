"""What a server says without being asked, at any moment (manual 55.2.7)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, add_databases, kinds
from tests.fixtures.postgres import Postgres
from tests.fixtures.servers import Tunnel
from tests.fixtures.wire import Message, Wire, query

STATUS = messages.parameter_status("TimeZone", "Antarctica/Troll")
NOTICE = messages.plain_notice("the server rests at noon")
NOTIFICATION = messages.message(b"A", b"\0\0\0\7channel\0payload\0")


@pytest.fixture
def member(proxy: Proxy) -> Organization:
    return proxy.create_organization()


@pytest.fixture
def tunnel(postgres: Postgres) -> Iterator[Tunnel]:
    with Tunnel((postgres.host, postgres.port)) as tunnel:
        yield tunnel


def by_way_of(tunnel: Tunnel, member: Organization, mode: PoolMode) -> str:
    """The name of the organisation's database behind `tunnel`."""
    port = str(member.proxy.postgres.port)
    dsn = member.direct_dsn.replace(port, str(tunnel.port)) + "?sslmode=disable"
    (name,) = asyncio.run(add_databases(member, [dsn], mode))
    return name


def test_client_of_a_session_hears_it_at_once(
    member: Organization, tunnel: Tunnel
) -> None:
    name = by_way_of(tunnel, member, PoolMode.SESSION)
    with RawClient.logged_in(member, name) as client:
        client.query("SELECT 1")
        for message in (STATUS, NOTICE, NOTIFICATION):
            tunnel.say(0, message)
            kind, body = client.receive()
            assert messages.message(kind, body) == message
        assert kinds(client.query("SELECT 1")) == "TDCZ"


@pytest.mark.parametrize("mode", [PoolMode.TRANSACTION, PoolMode.AUTO])
def test_client_in_a_transaction_hears_it_at_once(
    member: Organization, tunnel: Tunnel, mode: PoolMode
) -> None:
    name = by_way_of(tunnel, member, mode)
    with RawClient.logged_in(member, name) as client:
        client.query("BEGIN")
        tunnel.say(0, STATUS + NOTICE)
        assert kinds([client.receive(), client.receive()]) == "SN"
        assert kinds(client.query("COMMIT")) == "CZ"


@pytest.mark.parametrize("mode", [PoolMode.TRANSACTION, PoolMode.AUTO])
@pytest.mark.parametrize("is_cut", [False, True])
def test_idle_server_that_said_something_serves_the_next_client(
    member: Organization, tunnel: Tunnel, mode: PoolMode, is_cut: bool
) -> None:
    name = by_way_of(tunnel, member, mode)
    with RawClient.logged_in(member, name) as client:
        client.query("SELECT 1")
        said = STATUS + NOTICE + NOTIFICATION
        size = len(said) - 3 if is_cut else len(said)
        tunnel.say(0, said[:size])
        client.send(messages.query("SELECT 1"))
        tunnel.say(0, said[size:])
        # It may have come so late that it was said to this client.
        assert kinds(client.until(b"Z")).removeprefix("SNA") == "TDCZ"
        assert kinds(client.query("SELECT 1")) == "TDCZ"
        assert len(tunnel.sent) == 1


def test_setting_that_is_reloaded_is_told_as_by_postgres(
    proxy: Proxy, publisher: Postgres
) -> None:
    member = proxy.create_organization()
    role = publisher.create_role()
    direct = publisher.dsn(publisher.create_database(owner=role), role)
    (session,) = asyncio.run(add_databases(member, [direct], PoolMode.SESSION))
    transcripts = []
    try:
        for dsn in (direct, member.dsn(session)):
            with Wire(dsn) as client:
                client.ask(query("SELECT 1"))
                publisher.execute("ALTER SYSTEM SET TimeZone = 'Antarctica/Troll'")
                publisher.execute("SELECT pg_reload_conf()")
                # The postmaster is told before, and tells the others, in its time.
                answers: list[Message] = []
                while not any(message.kind == "S" for message in answers):
                    answers = client.ask(query("SELECT 1"))
                transcripts.append(answers)
            publisher.execute("ALTER SYSTEM RESET TimeZone")
            publisher.execute("SELECT pg_reload_conf()")
    finally:
        publisher.execute("ALTER SYSTEM RESET TimeZone")
        publisher.execute("SELECT pg_reload_conf()")
    assert transcripts[0] == transcripts[1]
    assert ("S", b"TimeZone\0Antarctica/Troll\0") in transcripts[1]
