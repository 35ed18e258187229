"""LISTEN and NOTIFY where clients share servers: one connection listens for all."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import (
    Message,
    RawClient,
    eventually,
    kinds,
    samples,
    status,
)

SHARED = ["transaction", "auto"]
each_mode = pytest.mark.parametrize("mode", SHARED)

LISTENERS = (
    "SELECT pid FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'ogelproxy listen'"
)


@pytest.fixture
def tenant(proxy: Proxy) -> Organization:
    """An organisation of the test's own."""
    return proxy.create_organization(limiter=LimiterMode.OFF)


@pytest.fixture
def direct(tenant: Organization) -> Iterator[psycopg.Connection]:
    """A connection to the organisation's database without the proxy."""
    with psycopg.connect(tenant.direct_dsn, autocommit=True) as connection:
        yield connection


def notification(message: Message) -> tuple[str, str]:
    """The channel and payload of a NotificationResponse (manual 55.7)."""
    kind, body = message
    assert kind == b"A", message
    channel, payload, rest = body[4:].split(b"\0")
    assert rest == b""
    return channel.decode(), payload.decode()


def notify(direct: psycopg.Connection, channel: str, payload: str = "") -> None:
    direct.execute("SELECT pg_notify(%s, %s)", [channel, payload])


def listen(client: RawClient, channel: str = "news") -> None:
    assert client.query(f"LISTEN {channel}") == [(b"C", b"LISTEN\0"), (b"Z", b"I")]


def silent(client: RawClient) -> bool:
    """Whether nothing came for a client up to the answer of a query."""
    return kinds(client.query("SELECT 1")) == "TDCZ"


def extended(sql: str) -> bytes:
    """A batch that runs a statement by the extended protocol."""
    return b"".join(
        (
            messages.message(b"P", b"\0" + sql.encode() + b"\0\0\0"),
            messages.message(b"B", bytes(8)),
            messages.message(b"D", b"P\0"),
            messages.message(b"E", bytes(5)),
            messages.message(b"S", b""),
        )
    )


@each_mode
def test_what_is_notified_right_after_the_answer_is_never_missed(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        for number in range(30):
            listen(client, f"c{number}")
            notify(direct, f"c{number}", "now")
            assert notification(client.receive()) == (f"c{number}", "now")


@each_mode
def test_a_hundred_clients_listen_over_one_connection(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    clients = [RawClient.logged_in(tenant, mode) for _ in range(100)]
    for client in clients:
        client.send(messages.query("LISTEN news"))
    for client in clients:
        assert kinds(client.until(b"Z")) == "CZ"
    rows = direct.execute(
        "SELECT count(*) FILTER (WHERE application_name = 'ogelproxy listen'), "
        "count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    ).fetchone()
    assert rows is not None
    assert rows[0] == 1
    assert rows[1] <= 2
    for number in range(20):
        notify(direct, "news", str(number))
    for client in clients:
        told = [notification(client.receive()) for _ in range(20)]
        assert told == [("news", str(number)) for number in range(20)]
        client.close()


@each_mode
def test_a_client_hears_its_own_notifications_with_the_notifier_s_process(
    tenant: Organization, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        listen(client)
        pid = int(client.query("SELECT pg_backend_pid()")[1][1][6:])
        assert kinds(client.query("NOTIFY news, 'mine'")) == "CZ"
        kind, body = client.receive()
        assert notification((kind, body)) == ("news", "mine")
        assert struct.unpack(">i", body[:4]) == (pid,)


@each_mode
def test_payloads_of_every_size_come_in_order(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    sizes = [0, 1, 100, 4000, 7999] * 20
    with RawClient.logged_in(tenant, mode) as client:
        listen(client)
        with direct.transaction():
            for number, size in enumerate(sizes):
                notify(direct, "news", f"{number:03}".ljust(size, "x")[:size])
        # Postgres folds what is equal within a transaction.
        wanted = dict.fromkeys(
            f"{number:03}".ljust(size, "x")[:size] for number, size in enumerate(sizes)
        )
        assert [notification(client.receive())[1] for _ in wanted] == list(wanted)


@each_mode
def test_organisations_share_no_channel(
    proxy: Proxy, tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    other = proxy.create_organization(limiter=LimiterMode.OFF)
    with (
        RawClient.logged_in(tenant, mode) as client,
        RawClient.logged_in(other, mode) as stranger,
        psycopg.connect(other.direct_dsn, autocommit=True) as beside,
    ):
        listen(client)
        listen(stranger)
        notify(direct, "news", "ours")
        assert notification(client.receive()) == ("news", "ours")
        notify(beside, "news", "theirs")
        assert notification(stranger.receive()) == ("news", "theirs")
        assert silent(client)
        assert silent(stranger)


@each_mode
@pytest.mark.parametrize(
    "ending", ["UNLISTEN news", "UNLISTEN *", "unlisten *; RESET ALL", "DISCARD ALL"]
)
def test_a_client_that_listens_no_more_hears_nothing(
    tenant: Organization, direct: psycopg.Connection, mode: str, ending: str
) -> None:
    with (
        RawClient.logged_in(tenant, mode) as client,
        RawClient.logged_in(tenant, mode) as beside,
    ):
        listen(client)
        listen(beside)
        assert client.query(ending)[-1] == (b"Z", b"I")
        notify(direct, "news", "one")
        assert notification(beside.receive()) == ("news", "one")
        assert silent(client)
        listen(client)
        notify(direct, "news", "two")
        assert notification(client.receive()) == ("news", "two")


@each_mode
def test_a_channel_that_nobody_listens_to_is_given_back(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        for _ in range(20):
            listen(client)
            assert kinds(client.query("UNLISTEN news")) == "CZ"
            listen(client)
            notify(direct, "news", "again")
            assert notification(client.receive()) == ("news", "again")
            assert kinds(client.query("UNLISTEN *")) == "CZ"
    # In its time, the connection is closed.
    eventually(lambda: direct.execute(LISTENERS).fetchall() == [])


@each_mode
@pytest.mark.parametrize(
    ("spelled", "channel"),
    [
        ("News", "news"),
        ('"News"', "News"),
        ('"a ""b"" c"', 'a "b" c'),
        ("grüße", "grüße"),
        ("x" * 80, "x" * 63),
        ('"' + "ü" * 40 + '"', "ü" * 31),
        ("_a$1 ; -- and no more\n", "_a$1"),
        ("/* of */ news /* the day */", "news"),
    ],
)
def test_channels_are_named_as_postgres_names_them(
    tenant: Organization,
    direct: psycopg.Connection,
    mode: str,
    spelled: str,
    channel: str,
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        listen(client, spelled)
        notify(direct, channel, "x")
        assert notification(client.receive()) == (channel, "x")


@each_mode
def test_a_listen_that_postgres_refuses_is_refused_in_its_words(
    tenant: Organization, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        answer = client.query("LISTEN select")
        assert kinds(answer) == "EZ"
        assert messages.read_fields(answer[0][1])["C"] == "42601"
        client.send(extended("LISTEN select"))
        assert kinds(client.until(b"Z")) == "12nEZ"
        listen(client)


@each_mode
def test_notifications_wait_for_the_end_of_a_transaction(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        listen(client)
        client.query("BEGIN")
        for number in range(5):
            notify(direct, "news", str(number))
        with RawClient.logged_in(tenant, mode) as beside:
            # It hears of nothing from before it listened; and once it has heard of
            # the last one, the other could have heard of all.
            listen(beside)
            notify(direct, "news", "last")
            assert notification(beside.receive()) == ("news", "last")
        assert silent(client)
        assert client.query("COMMIT")[-1] == (b"Z", b"I")
        told = [notification(client.receive())[1] for _ in range(6)]
        assert told == ["0", "1", "2", "3", "4", "last"]


@each_mode
def test_a_listen_in_the_extended_protocol_is_the_same(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        client.send(extended("SELECT 1") + extended("LISTEN news"))
        assert kinds(client.until(b"Z")) == "12TDCZ"
        assert kinds(client.until(b"Z")) == "12nCZ"
        notify(direct, "news", "one")
        assert notification(client.receive()) == ("news", "one")
        client.send(extended("UNLISTEN news") + extended("SELECT 1"))
        assert client.until(b"Z")[-2] == (b"C", b"UNLISTEN\0")
        assert kinds(client.until(b"Z")) == "12TDCZ"
        notify(direct, "news", "two")
        assert silent(client)


def test_a_listen_inside_a_transaction_is_refused_where_it_would_be_lost(
    tenant: Organization,
) -> None:
    with RawClient.logged_in(tenant, "transaction") as client:
        assert client.query("BEGIN")[-1] == (b"Z", b"T")
        answer = client.query("LISTEN news")
        assert (kinds(answer), answer[-1][1]) == ("EZ", b"E")
        fields = messages.read_fields(answer[0][1])
        assert fields["C"] == "0A000"
        assert "session mode" in fields["H"]
        assert client.query("ROLLBACK")[-1] == (b"Z", b"I")
        listen(client)


@pytest.mark.parametrize(
    "text",
    [
        "/* first of all */ LISTEN news",
        "SELECT 1; LISTEN news",
        "BEGIN; LISTEN news; COMMIT",
        "LISTEN news; UNLISTEN other",
        'LISTEN U&"news"',
    ],
)
def test_a_listen_that_would_be_lost_is_refused_in_transaction_mode(
    tenant: Organization, text: str
) -> None:
    with RawClient.logged_in(tenant, "transaction") as client:
        for message in (messages.query(text), extended(text)):
            if b"; " in message and message.startswith(b"P"):
                continue  # one statement per Parse
            client.send(message)
            answer = client.until(b"Z")
            assert kinds(answer).endswith("EZ")
            assert answer[-1][1] == b"I"
            assert messages.read_fields(answer[-2][1])["C"] == "0A000"


def test_a_listen_of_any_form_is_heard_in_auto_mode(
    tenant: Organization, direct: psycopg.Connection
) -> None:
    for text in ("/* first */ LISTEN news", "SELECT 1; LISTEN news", 'LISTEN U&"news"'):
        with RawClient.logged_in(tenant, "auto") as client:
            assert client.query(text)[-1] == (b"Z", b"I")
            notify(direct, "news", "one")
            assert notification(client.receive()) == ("news", "one")


def test_a_listen_inside_a_transaction_takes_effect_with_it_in_auto_mode(
    tenant: Organization, direct: psycopg.Connection
) -> None:
    with RawClient.logged_in(tenant, "auto") as client:
        client.query("BEGIN")
        assert client.query("LISTEN news")[-1] == (b"Z", b"T")
        client.query("COMMIT")
        notify(direct, "news", "one")
        assert notification(client.receive()) == ("news", "one")


@pytest.mark.parametrize("mode", ["transaction", "auto"])
def test_payloads_never_come_in_another_encoding(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with (
        tenant.connect(mode, client_encoding="unicode") as modern,
        tenant.connect(mode, client_encoding="latin1") as old,
    ):
        modern.execute("LISTEN news")
        if mode == "auto":
            old.execute("LISTEN news")
            notify(direct, "news", "grüße")
            told = [each.payload for each in old.notifies(timeout=10, stop_after=1)]
            assert told == ["grüße"]
        else:
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                old.execute("LISTEN news")
            notify(direct, "news", "grüße")
        told = [each.payload for each in modern.notifies(timeout=10, stop_after=1)]
        assert told == ["grüße"]


def test_psycopg_hears_its_notifications(
    tenant: Organization, direct: psycopg.Connection
) -> None:
    with tenant.connect("transaction") as client:
        client.execute("LISTEN news")
        for number in range(3):
            notify(direct, "news", str(number))
        told = [each.payload for each in client.notifies(timeout=10, stop_after=3)]
        assert told == ["0", "1", "2"]
        client.execute("UNLISTEN news")
        assert client.execute("SELECT 1").fetchone() == (1,)


@each_mode
async def test_asyncpg_hears_its_notifications(tenant: Organization, mode: str) -> None:
    client = await asyncpg.connect(tenant.dsn(mode))
    beside = await asyncpg.connect(tenant.dsn(mode))
    heard: asyncio.Queue[str] = asyncio.Queue()

    def hear(_: object, pid: int, channel: str, payload: object) -> None:
        heard.put_nowait(f"{channel} {payload}")

    await client.add_listener("News of today", hear)
    await beside.execute("SELECT pg_notify('News of today', 'one')")
    async with asyncio.timeout(10):
        assert await heard.get() == "News of today one"
    await client.remove_listener("News of today", hear)
    await client.reset()
    assert await client.fetchval("SELECT 1") == 1
    await client.close()
    await beside.close()


@pytest.fixture
def strict(own_proxy: Proxy) -> Organization:
    """An organisation whose proxy keeps few notifications."""
    own_proxy.settings["OGELPROXY_CLIENT_MAX_NOTIFICATIONS"] = "10"
    own_proxy.settings["OGELPROXY_CLIENT_MAX_NOTIFICATION_BYTES"] = "65536"
    own_proxy.start()
    return own_proxy.create_organization(limiter=LimiterMode.OFF)


def test_a_client_that_stays_in_a_transaction_is_ended_when_too_many_wait(
    strict: Organization,
) -> None:
    with (
        RawClient.logged_in(strict, "transaction") as slow,
        RawClient.logged_in(strict, "transaction") as brisk,
    ):
        listen(slow)
        listen(brisk)
        slow.query("BEGIN")
        for number in range(11):
            brisk.send(messages.query(f"NOTIFY news, '{number}'"))
        # Answers come between notifications, which this one gets all of.
        told = [kind for _ in range(11) for kind, _ in brisk.until(b"Z")]
        while told.count(b"A") < 11:
            told.append(brisk.receive()[0])
        fields = slow.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "53400")
        assert "notifications" in fields["M"]


def test_a_client_that_does_not_read_is_ended_when_too_many_wait(
    strict: Organization,
) -> None:
    with RawClient.logged_in(strict, "transaction") as slow:
        listen(slow)
        with psycopg.connect(strict.direct_dsn, autocommit=True) as direct:
            before = strict.proxy.memory_kb
            while status(strict)["clients"]:
                direct.execute(
                    "SELECT pg_notify('news', n || repeat('x', 7000)) "
                    "FROM generate_series(1, 100) AS n"
                )
            assert strict.proxy.memory_kb - before < 10_000


@each_mode
def test_listeners_end_when_what_listens_for_them_is_lost(
    tenant: Organization, direct: psycopg.Connection, mode: str
) -> None:
    with (
        RawClient.logged_in(tenant, mode) as client,
        RawClient.logged_in(tenant, mode) as beside,
    ):
        listen(client)
        assert silent(beside)
        for (pid,) in direct.execute(LISTENERS).fetchall():
            direct.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        fields = client.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
        assert silent(beside)
        listen(beside)
        notify(direct, "news", "again")
        assert notification(beside.receive()) == ("news", "again")


def test_a_listen_waits_for_a_token_and_is_counted(proxy: Proxy) -> None:
    throttled = proxy.create_organization(tier="free")
    with RawClient.logged_in(throttled, "transaction") as client:
        answers = [client.query("LISTEN news") for _ in range(15)]
        refused = [answer for answer in answers if kinds(answer) == "EZ"]
        assert refused
        for answer in refused:
            assert messages.read_fields(answer[0][1])["C"] == "53400"


def test_clients_that_leave_while_they_wait_to_listen_leave_nothing(
    tenant: Organization, direct: psycopg.Connection
) -> None:
    clients = [RawClient.logged_in(tenant, "transaction") for _ in range(20)]
    for number, client in enumerate(clients):
        client.send(messages.query(f"LISTEN c{number}"))
        client.reset() if number % 2 else client.close()
    eventually(lambda: status(tenant)["clients"] == 0)
    with RawClient.logged_in(tenant, "transaction") as client:
        listen(client, "c1")
        notify(direct, "c1", "x")
        assert notification(client.receive()) == ("c1", "x")
    eventually(lambda: direct.execute(LISTENERS).fetchall() == [])


def test_metrics_count_listeners_and_notifications(own_proxy: Proxy) -> None:
    own_proxy.start()
    tenant = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with RawClient.logged_in(tenant, "transaction") as client:
        listen(client, "one")
        listen(client, "two")
        client.query("NOTIFY one")
        assert notification(client.receive()) == ("one", "")
        found = samples(own_proxy)
        assert found["o7s_listening_clients"] == 1
        assert found["o7s_channels"] == 2
        assert found["o7s_notifications_total"] == 1
        assert found["o7s_kept_notifications"] == 0
    eventually(lambda: samples(own_proxy)["o7s_listening_clients"] == 0)
    assert not [name for name in samples(own_proxy) if re.search("one|two", name)]
