"""Layers 1 and 2 through a running proxy: who gets in, and how the others are told."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from ogelproxy.auth.scram import ScramClient
from ogelproxy.protocol import messages
from tests.fixtures.certificates import Authority
from tests.fixtures.engine import ACTOR, Organization, Proxy, create_key
from tests.fixtures.faults import PATIENCE, RawClient, eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.secured import JWT_SECRET, REJECTED, connects, token
from tests.fixtures.wire import Wire

#: A well-formed key that nobody has.
WRONG_KEY = "ogk_" + "x" * 32


@pytest.fixture
def member(proxy: Proxy) -> Organization:
    """An organisation of the test's own."""
    return proxy.create_organization()


# Keys.


@pytest.mark.parametrize("database", ["app", "session", "transaction", "auto"])
def test_right_key_gets_in(organization: Organization, database: str) -> None:
    with organization.connect(database) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)


def test_every_live_key_of_an_organization_gets_in(member: Organization) -> None:
    with member.connect():
        pass  # so that the record is in the proxy's memory
    second, key_id = member.proxy.operate(
        lambda store: create_key(store, member.handle, "second")
    )
    eventually(lambda: connects(member.dsn(key=second)))
    assert connects(member.dsn())
    member.proxy.operate(
        lambda store: store.revoke_key(member.handle, key_id, actor=ACTOR)
    )
    eventually(lambda: not connects(member.dsn(key=second)))
    assert member.proxy.refusal(member.handle, second) == REJECTED
    assert connects(member.dsn())


def test_wrong_key_is_rejected(member: Organization) -> None:
    for key in (WRONG_KEY, member.key[:-1], member.key + "x", member.key.upper()):
        assert member.proxy.refusal(member.handle, key) == REJECTED


def test_key_of_another_organization_is_rejected(
    member: Organization, organization: Organization
) -> None:
    assert member.proxy.refusal(member.handle, organization.key) == REJECTED


def test_organization_without_a_key_left_rejects_every_key(
    member: Organization,
) -> None:
    member.proxy.operate(
        lambda store: store.revoke_key(member.handle, member.key_id, actor=ACTOR)
    )
    assert member.proxy.refusal(member.handle, member.key) == REJECTED


def test_suspended_organization_is_told_so_only_with_its_key(
    member: Organization,
) -> None:
    member.proxy.operate(lambda store: store.suspend(member.handle, actor=ACTOR))
    assert member.proxy.refusal(member.handle, member.key) == {
        "S": "FATAL",
        "V": "FATAL",
        "C": "57P04",
        "M": "organisation is suspended",
    }
    assert member.proxy.refusal(member.handle, WRONG_KEY) == REJECTED


@pytest.mark.parametrize(
    "user",
    [
        "postgres",
        "org_",
        "ORG_ABC",
        "org_abc-def",
        "org_abc.jwt.jwt",
        "org_abc;--",
        "org_" + "x" * 57,
        "org_ä",
        "org_abc\n",
        ".jwt",
        " ",
    ],
)
def test_user_that_is_no_handle_is_rejected(proxy: Proxy, user: str) -> None:
    with RawClient(proxy) as client:
        client.start(user, "app")
        assert client.refusal() == REJECTED


def test_startup_without_a_user_is_a_violation(proxy: Proxy) -> None:
    with RawClient(proxy) as client:
        client.send(messages.startup({"database": "app"}))
        refusal = client.refusal()
    assert (refusal["S"], refusal["C"]) == ("FATAL", "08P01")


def test_unknown_database_is_refused_by_its_name(member: Organization) -> None:
    assert member.proxy.refusal(member.handle, member.key, "nowhere") == {
        "S": "FATAL",
        "V": "FATAL",
        "C": "3D000",
        "M": 'database "nowhere" does not exist',
    }


def test_database_of_the_same_name_is_each_organizations_own(
    member: Organization, organization: Organization
) -> None:
    names = []
    for each in (member, organization):
        with each.connect("app") as connection:
            names.append(connection.execute("SELECT current_database()").fetchone())
    assert names[0] != names[1]


def test_stranger_learns_nothing_of_the_databases(member: Organization) -> None:
    for database in ("app", "nowhere"):
        refused = member.proxy.refusal(member.handle, WRONG_KEY, database)
        assert refused == REJECTED


# What an outsider can tell apart.


class Transcript(NamedTuple):
    """A login that fails: what the proxy sent, the nonce masked, and the salt."""

    messages: list[tuple[bytes, bytes]]
    salt: bytes


def fail_to_log_in(proxy: Proxy, user: str, key: str = WRONG_KEY) -> Transcript:
    with RawClient(proxy) as client:
        client.start(user, "app")
        received = [client.receive()]
        scram = ScramClient("", key)
        first = scram.first()
        size = len(first).to_bytes(4, "big")
        client.send(messages.message(b"p", b"SCRAM-SHA-256\0" + size + first))
        kind, challenge = client.receive()
        nonce, salt, rest = challenge[4:].split(b",", 2)
        received.append((kind, challenge[:4] + b"%d %s" % (len(nonce), rest)))
        client.send(messages.message(b"p", scram.final(challenge[4:])))
        received += client.to_end()
    return Transcript(received, base64.b64decode(salt.removeprefix(b"s=")))


def test_wrong_key_and_unknown_organization_look_the_same(
    member: Organization,
) -> None:
    proxy = member.proxy
    wrong = fail_to_log_in(proxy, member.handle)
    unknown = fail_to_log_in(proxy, "org_nobody_has_this_name")
    assert wrong.messages == unknown.messages
    assert [kind for kind, _ in wrong.messages] == [b"R", b"R", b"E"]
    assert len(wrong.salt) == len(unknown.salt)


def test_salt_is_the_same_at_every_try_and_another_for_every_name(
    member: Organization,
) -> None:
    proxy = member.proxy
    salts = {
        name: {fail_to_log_in(proxy, name).salt for _ in range(2)}
        for name in (member.handle, "org_nobody", "org_nobody_else")
    }
    assert all(len(each) == 1 for each in salts.values())
    assert len(set.union(*salts.values())) == 3


def test_salt_of_an_unknown_name_outlives_a_restart(own_proxy: Proxy) -> None:
    own_proxy.start()
    before = fail_to_log_in(own_proxy, "org_nobody")
    own_proxy.kill()
    own_proxy.start()
    assert fail_to_log_in(own_proxy, "org_nobody") == before


def test_unknown_organization_is_found_as_soon_as_it_exists(proxy: Proxy) -> None:
    handle = f"org_late_{os.urandom(4).hex()}"
    assert proxy.refusal(handle, WRONG_KEY) == REJECTED
    proxy.operate(
        lambda store: store.create_organization(
            handle, name="late", tier="free", actor=ACTOR
        )
    )
    key, _ = proxy.operate(lambda store: create_key(store, handle, "first"))
    # It has no database yet: who may learn that has logged in.
    eventually(lambda: proxy.refusal(handle, key)["C"] == "3D000", 2.0)


# The failure budget.


def throttle(organization: Organization) -> dict[str, str]:
    """Fail until the failure budget is spent; return the first other refusal."""
    started = time.monotonic()
    for count in range(100):
        refused = organization.proxy.refusal(organization.handle, WRONG_KEY)
        if refused["C"] != "28P01":
            # auth.max_failures, and one more for each 6 s that have gone by.
            assert 10 <= count <= 10 + (time.monotonic() - started) / 6
            return refused
        assert refused == REJECTED
    raise AssertionError("was never throttled")


def test_source_that_failed_too_often_is_throttled_even_with_the_key(
    member: Organization,
) -> None:
    refused = throttle(member)
    assert (refused["S"], refused["C"]) == ("FATAL", "28000")
    assert refused["M"].startswith("too many failed logins from your network")
    assert refused["H"].startswith("retry after ")
    assert member.proxy.refusal(member.handle, member.key)["C"] == "28000"


def test_throttled_source_gets_in_to_other_organizations(
    member: Organization, organization: Organization
) -> None:
    throttle(member)
    assert connects(organization.dsn())


def test_throttled_organization_lets_other_sources_in(member: Organization) -> None:
    throttle(member)
    # Sources are told apart by their /24.
    with RawClient(member.proxy, source="127.0.0.2") as neighbour:
        neighbour.start(member.handle, "app")
        assert neighbour.refusal()["C"] == "28000"
    with RawClient(member.proxy, source="127.0.2.1") as elsewhere:
        elsewhere.start(member.handle, "app")
        elsewhere.authenticate(member.key)
        assert elsewhere.until(b"Z")[-1][1] == b"I"


def test_unknown_organization_is_throttled_as_a_known_one(
    member: Organization,
) -> None:
    known = throttle(member)
    handle = f"org_none_{os.urandom(4).hex()}"
    for _ in range(10):
        assert member.proxy.refusal(handle, WRONG_KEY) == REJECTED
    unknown = member.proxy.refusal(handle, WRONG_KEY)
    assert known | {"H": ""} == unknown | {"H": ""}


# Start-up settings.


@pytest.mark.parametrize("database", ["session", "transaction", "auto"])
def test_startup_settings_arrive(organization: Organization, database: str) -> None:
    with (
        organization.connect(
            database,
            application_name="a 'quoted' name",
            options="-c work_mem=1234kB --statement-timeout=5s "
            "-c search_path=one,\\ two -c extra.word=a\\ b",
            client_encoding="latin1",
        ) as connection,
        organization.connect(database) as plain,
    ):
        wanted = {
            "application_name": "a 'quoted' name",
            "work_mem": "1234kB",
            "statement_timeout": "5s",
            "search_path": "one, two",
            "extra.word": "a b",
            "client_encoding": "LATIN1",
        }
        for name, value in wanted.items():
            for each, expected in ((connection, True), (plain, False)):
                row = each.execute(
                    "SELECT current_setting(%s, true)", [name]
                ).fetchone()
                assert row is not None
                assert (row[0] == value) == expected, name
        assert connection.info.parameter_status("client_encoding") == "LATIN1"
        named = connection.info.parameter_status("application_name")
        assert named == "a 'quoted' name"


@pytest.mark.parametrize(
    "options",
    [
        "-c no_such_setting=1",
        "-c work_mem=much",
        "-c statement_timeout=-5",
        "-c max_connections=5",
        "-c client_encoding=klingon",
    ],
)
def test_bad_startup_setting_is_refused_in_the_words_of_postgres(
    organization: Organization, options: str
) -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        Wire(organization.direct_dsn, {"options": options})
    direct = caught.value.args[0]
    refused = organization.proxy.refusal(
        organization.handle, organization.key, options=options
    )
    assert refused["S"] == "FATAL"
    assert refused["C"] == direct["C"]
    assert refused["M"] == direct["M"]
    assert refused.get("D") == direct.get("D")


def test_database_works_on_after_a_bad_startup_setting(
    organization: Organization,
) -> None:
    for _ in range(30):  # more than the pool has servers
        refused = organization.proxy.refusal(
            organization.handle, organization.key, "transaction", work_mem="much"
        )
        assert refused["C"] == "22023"
    assert connects(organization.dsn("transaction"))


@pytest.mark.parametrize("database", ["session", "auto"])
def test_startup_parameter_wins_over_the_options(
    organization: Organization, database: str
) -> None:
    given = {"options": "-c client_encoding=LATIN1", "client_encoding": "UTF8"}
    for dsn in (organization.direct_dsn, organization.dsn(database)):
        with Wire(dsn, given) as wire:
            assert wire.statuses["client_encoding"] == "UTF8"


def test_startup_packet_is_as_long_as_postgres_takes_it(
    proxy: Proxy, postgres: Postgres
) -> None:
    # A length word, and 10,000 bytes (MAX_STARTUP_PACKET_LENGTH).
    given = {"user": "org_nobody", "database": "app", "application_name": ""}
    given["application_name"] = "x" * (10_004 - len(messages.startup(given)))
    packet = messages.startup(given)
    for port in (postgres.port, proxy.port):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            client.sendall(packet)
            assert client.recv(1) == b"R"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"X\0\0\0\4", id="a Terminate message"),
        pytest.param(struct.pack(">ii", 7, 196608), id="too short"),
        pytest.param(struct.pack(">ii", 10_005, 196608), id="too long"),
    ],
)
def test_first_packet_of_impossible_length_is_answered_by_silence(
    proxy: Proxy, postgres: Postgres, head: bytes
) -> None:
    for port in (postgres.port, proxy.port):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            client.sendall(head)
            # Postgres closes with bytes unread: a reset, where the proxy's end is
            # an orderly one.
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""


# The log.


def test_no_secret_is_ever_logged(
    own_proxy: Proxy, authority: Authority, tmp_path: Path
) -> None:
    issued = authority.issue()
    own_proxy.settings |= {
        "O7S_LOG_LEVEL": "debug",
        "JWT_SECRET": JWT_SECRET,
        "OGELPROXY_TLS_CERT": str(issued.cert),
        "OGELPROXY_TLS_KEY": str(issued.key),
    }
    own_proxy.start()
    member = own_proxy.create_organization()
    handle = member.handle
    good, expired = token(handle), token(handle, exp=1)
    logins = [
        (handle, member.key, "app"),
        (handle, member.key, "nowhere"),
        (handle, WRONG_KEY, "app"),
        (member.key, member.key, "app"),  # the key where the user should be
        (handle, member.key, member.key),
        (f"{handle}.jwt", good, "app"),
        (f"{handle}.jwt", expired, "app"),
        (f"{handle}.jwt", member.key, "app"),
        (good, good, good),
    ]
    for sslmode in ("disable", "require"):
        for login in logins:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(own_proxy.dsn(*login), sslmode=sslmode).close()
    with member.connect(application_name=member.key) as connection:
        connection.execute("SELECT %s", [member.key])
        with pytest.raises(psycopg.errors.UndefinedColumn):
            connection.execute(f'SELECT "{member.key}"')
    assert own_proxy.stop() == 0
    log = own_proxy.log.read_text()
    assert "login refused" in log
    server = psycopg.conninfo.conninfo_to_dict(member.direct_dsn)
    for secret in (
        member.key,
        WRONG_KEY,
        good,
        expired,
        good.split(".")[2],
        JWT_SECRET,
        own_proxy.secret_key,
        str(server["password"]),
        own_proxy.postgres.password(),
    ):
        assert secret not in log
    assert "Traceback" not in log
