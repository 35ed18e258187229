"""Servers that end, stay silent, refuse or talk nonsense."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from ogelproxy.protocol import messages
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy, free_port
from tests.fixtures.faults import (
    FakeServer,
    RawClient,
    add_databases,
    eventually,
    kinds,
    samples,
    status,
)
from tests.fixtures.postgres import Postgres

MODES = ["session", "transaction", "auto"]
each_mode = pytest.mark.parametrize("mode", MODES)

LOGIN = (
    messages.AUTHENTICATION_OK
    + messages.parameter_status("server_version", "17.0")
    + messages.backend_key_data(7, b"1234")
    + messages.READY_IDLE
)


@pytest.fixture(scope="module")
def brisk(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy that waits for servers for one second."""
    settings = {
        "OGELPROXY_POOL_CONNECT_TIMEOUT": "1",
        "OGELPROXY_POOL_QUEUE_TIMEOUT": "2",
    }
    proxy = Proxy(postgres, tmp_path_factory.mktemp("brisk"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def tenant(brisk: Proxy) -> Organization:
    """An organisation of the test's own, whose servers can be counted."""
    return brisk.create_organization(limiter=LimiterMode.OFF)


class Places:
    """Database names of one organisation, each routed to a socket of its own."""

    def __init__(self, proxy: Proxy, count: int) -> None:
        self.tenant = proxy.create_organization(limiter=LimiterMode.OFF)
        self._free: dict[str, list[tuple[str, socket.socket]]] = {}
        for mode in MODES:
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
            dsns = [
                f"postgresql://anna:bird@127.0.0.1:{port(each)}/d?sslmode=disable"
                for each in sockets
            ]
            made = add_databases(self.tenant, dsns, self.tenant.databases[mode])
            self._free[mode] = list(zip(asyncio.run(made), sockets, strict=True))

    def take(self, mode: str) -> tuple[str, socket.socket]:
        """A name and the socket that it leads to, never given before."""
        return self._free[mode].pop()

    def close(self) -> None:
        for _, each in itertools.chain(*self._free.values()):
            each.close()


def port(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def places(brisk: Proxy) -> Iterator[Places]:
    places = Places(brisk, len(TALKS) + len(ANSWERS) + 2)
    yield places
    places.close()


def terminate(organization: Organization) -> int:
    """End all server connections of the proxy to the organisation's database."""
    with psycopg.connect(organization.direct_dsn, autocommit=True) as direct:
        rows = direct.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        ).fetchall()
    return len(rows)


# Real servers that end.


@each_mode
def test_a_server_that_ends_in_the_pool_is_replaced(
    tenant: Organization, mode: str
) -> None:
    with tenant.connect(mode) as client:
        client.execute("SELECT 1")
    eventually(lambda: status(tenant)["idle"] == 1)
    assert terminate(tenant) == 1
    eventually(lambda: status(tenant)["servers"] == 0)
    with tenant.connect(mode) as client:
        assert client.execute("SELECT 2").fetchone() == (2,)


@pytest.mark.parametrize("mode", ["transaction", "auto"])
def test_a_client_between_transactions_never_notices_that_a_server_ended(
    tenant: Organization, mode: str
) -> None:
    with tenant.connect(mode) as client:
        client.execute("SELECT 1")
        assert terminate(tenant) == 1
        eventually(lambda: status(tenant)["servers"] == 0)
        assert client.execute("SELECT 2").fetchone() == (2,)
        with client.transaction():
            assert client.execute("SELECT 3").fetchone() == (3,)


@pytest.mark.parametrize("mode", ["transaction", "auto"])
def test_a_query_is_not_sent_to_a_server_that_ended_before_it_was_read(
    own_proxy: Proxy, mode: str
) -> None:
    own_proxy.start()
    tenant = own_proxy.create_organization(limiter=LimiterMode.OFF)
    assert own_proxy.process is not None
    with RawClient.logged_in(tenant, mode) as client:
        assert kinds(client.query("SELECT 1")) == "TDCZ"
        eventually(lambda: status(tenant)["idle"] == 1)
        own_proxy.process.send_signal(signal.SIGSTOP)
        # Now the proxy hears of the query first, and of the server's end next.
        client.send(messages.query("SELECT 2"))
        assert terminate(tenant) == 1
        own_proxy.process.send_signal(signal.SIGCONT)
        assert kinds(client.until(b"Z")) == "TDCZ"
    assert status(tenant)["servers"] <= 1


@each_mode
def test_a_server_that_ends_in_a_query_says_so_and_the_next_connection_works(
    tenant: Organization, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        client.send(messages.query("SELECT pg_sleep(60)"))
        eventually(lambda: status(tenant)["idle"] == 0)
        eventually(lambda: terminate(tenant) == 1)
        fields = client.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
    with tenant.connect(mode) as after:
        assert after.execute("SELECT 1").fetchone() == (1,)


@each_mode
def test_a_server_that_ends_in_a_transaction_ends_the_client(
    tenant: Organization, mode: str
) -> None:
    with RawClient.logged_in(tenant, mode) as client:
        assert client.query("BEGIN")[-1] == (b"Z", b"T")
        assert terminate(tenant) == 1
        fields = client.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
    with tenant.connect(mode) as after:
        assert after.execute("SELECT 1").fetchone() == (1,)


@each_mode
@pytest.mark.parametrize(
    ("copy", "begun"),
    [
        ("COPY copied FROM STDIN", b"G"),
        (
            "COPY (SELECT repeat('x', 999) FROM generate_series(1, 1e7)) TO STDOUT",
            b"d",
        ),
    ],
    ids=["in", "out"],
)
def test_a_server_that_ends_in_a_copy_ends_its_client_only(
    tenant: Organization, mode: str, copy: str, begun: bytes
) -> None:
    with tenant.connect(mode) as beside:
        beside.execute("CREATE TABLE copied (t text)")
    with RawClient.logged_in(tenant, mode) as client:
        client.send(messages.query(copy))
        client.until(begun)
        if begun == b"G":
            client.send(messages.message(b"d", b"1\n"))
        assert terminate(tenant) >= 1
        if begun == b"G":
            # Postgres looks for its end when it has read what there is to copy.
            client.send(messages.message(b"d", b"2\n"))
        told = client.to_end()
    errors = [messages.read_fields(body) for kind, body in told if kind == b"E"]
    # What was cut inside of a row leaves no place for an error.
    assert [fields["C"] for fields in errors] in (["57P01"], ["08006"], [])
    assert errors or begun == b"d"
    eventually(lambda: status(tenant)["clients"] == 0)
    with tenant.connect(mode) as after:
        assert after.execute("SELECT count(*) FROM copied").fetchone() == (0,)


def test_a_restart_of_the_target_is_survived(
    postgres: Postgres, proxy: Proxy, organization: Organization
) -> None:
    with organization.connect("transaction") as client:
        client.execute("SELECT 1")
        asyncio.run(postgres.restart())
        eventually(lambda: works(client), timeout=20)
    with organization.connect("session") as client:
        assert client.execute("SELECT 2").fetchone() == (2,)


def works(client: psycopg.Connection) -> bool:
    """Try a query; the connection must live, whatever the answer."""
    try:
        return client.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError as error:
        assert error.sqlstate == "08006", error
        assert not client.closed
        return False


def test_known_tenants_work_while_the_control_plane_is_away(
    postgres: Postgres, own_proxy: Proxy
) -> None:
    own_proxy.start()
    known = own_proxy.create_organization(limiter=LimiterMode.OFF)
    fresh = own_proxy.create_organization(limiter=LimiterMode.OFF)
    with known.connect("transaction") as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
    with control_away(postgres, own_proxy):
        with known.connect("transaction") as client:
            assert client.execute("SELECT 2").fetchone() == (2,)
        with RawClient(own_proxy) as stranger:
            stranger.start(fresh.handle, "app")
            fields = stranger.refusal()
            assert (fields["S"], fields["C"]) == ("FATAL", "57P03")
    eventually(lambda: can_connect(fresh), timeout=20)
    with known.connect("transaction") as client:
        assert client.execute("SELECT 3").fetchone() == (3,)


class control_away:
    """Within it, the control plane's database takes no connections."""

    def __init__(self, postgres: Postgres, proxy: Proxy) -> None:
        self._postgres = postgres
        self._name = sql.Identifier(proxy.control)
        self._literal = sql.Literal(proxy.control)

    def _allow(self, verdict: str) -> None:
        self._postgres.execute(
            sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(
                self._name, sql.SQL("true" if verdict == "yes" else "false")
            )
        )

    def __enter__(self) -> None:
        self._allow("no")
        self._postgres.execute(
            sql.SQL(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = {}"
            ).format(self._literal)
        )

    def __exit__(self, *_: object) -> None:
        self._allow("yes")


def can_connect(organization: Organization) -> bool:
    try:
        with organization.connect() as client:
            return client.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


# Logging in to servers.


@pytest.mark.parametrize(
    ("method", "encryption"),
    [
        ("scram-sha-256", "scram-sha-256"),
        ("md5", "md5"),
        ("password", "scram-sha-256"),
        ("trust", "scram-sha-256"),
    ],
)
def test_servers_are_logged_in_to_by_every_method(
    postgres: Postgres, tenant: Organization, method: str, encryption: str
) -> None:
    role = postgres.create_role(encryption=encryption)
    rules = Path(setting(postgres, "hba_file"))
    before = rules.read_text()
    try:
        rules.write_text(f"host all {role} 127.0.0.1/32 {method}\n{before}")
        postgres.execute("SELECT pg_reload_conf()")
        eventually(lambda: rule_applies(postgres, role))
        name = add(tenant, postgres.dsn("postgres", role))
        with psycopg.connect(tenant.dsn(name)) as client:
            assert client.execute("SELECT current_user").fetchone() == (role,)
    finally:
        rules.write_text(before)
        postgres.execute("SELECT pg_reload_conf()")


def setting(postgres: Postgres, name: str) -> str:
    with psycopg.connect(postgres.dsn()) as connection:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def rule_applies(postgres: Postgres, role: str) -> bool:
    with psycopg.connect(postgres.dsn()) as connection:
        return (
            connection.execute(
                "SELECT 1 FROM pg_hba_file_rules WHERE %s = ANY (user_name)", [role]
            ).fetchone()
            is not None
        )


def test_a_server_is_logged_in_to_over_its_socket(
    postgres: Postgres, tenant: Organization
) -> None:
    if postgres.socket_directory is None:
        pytest.skip("the named Postgres has no socket that is known")
    role = postgres.create_role()
    name = add(tenant, postgres.socket_dsn("postgres", role))
    with psycopg.connect(tenant.dsn(name)) as client:
        assert client.execute("SELECT current_user").fetchone() == (role,)


def test_a_wrong_password_of_ours_is_no_news_for_the_client(
    postgres: Postgres, tenant: Organization
) -> None:
    role = postgres.create_role()
    dsn = f"postgresql://{role}:wrong@127.0.0.1:{postgres.port}/postgres"
    refused(tenant, add(tenant, dsn), role, str(postgres.port))


# Servers that can't be reached, and fake ones.


def add(tenant: Organization, dsn: str) -> str:
    """Route a new database name of an organisation that never logged in."""
    (name,) = asyncio.run(add_databases(tenant, [dsn]))
    return name


def refused(tenant: Organization, name: str, *secrets: str) -> None:
    """Check that a client of database `name` is refused in time, without `secrets`."""
    began = time.monotonic()
    with RawClient(tenant.proxy) as client:
        client.start(tenant.handle, name)
        client.authenticate(tenant.key)
        fields = client.refusal()
    assert time.monotonic() - began < 8
    assert (fields["S"], fields["C"]) == ("FATAL", "08006")
    assert fields["M"] == "the database can't be reached"
    for secret in (*secrets, "127.0.0.1", "anna", "bird"):
        assert all(secret not in text for text in fields.values())
    # The others of the organisation are not affected.
    with tenant.connect() as beside:
        assert beside.execute("SELECT 1").fetchone() == (1,)


def test_a_closed_port_is_refused_without_its_address(tenant: Organization) -> None:
    closed = free_port()
    dsn = f"postgresql://anna:bird@127.0.0.1:{closed}/d"
    refused(tenant, add(tenant, dsn), str(closed))


def test_a_host_that_is_not_known_is_refused_without_its_name(
    tenant: Organization,
) -> None:
    dsn = "postgresql://anna:bird@nowhere.invalid/d"
    refused(tenant, add(tenant, dsn), "nowhere")


def test_a_socket_that_is_not_there_is_refused(
    tenant: Organization, tmp_path: Path
) -> None:
    dsn = f"postgresql://anna@/d?host={tmp_path}"
    refused(tenant, add(tenant, dsn), str(tmp_path))


def silent(connected: socket.socket) -> None:
    while connected.recv(4096):
        pass


def half_silent(connected: socket.socket) -> None:
    connected.recv(4096)
    connected.sendall(LOGIN[:7])
    silent(connected)


def saying(*parts: bytes) -> Callable[[socket.socket], None]:
    """Answer each thing that comes with the next of `parts`, then close."""

    def talk(connected: socket.socket) -> None:
        for part in parts:
            if not connected.recv(65536):
                return
            connected.sendall(part)

    return talk


def endless(connected: socket.socket) -> None:
    connected.recv(4096)
    connected.sendall(messages.AUTHENTICATION_OK)
    while True:
        connected.sendall(messages.parameter_status("a", "b") * 100)


def asking(code: int, data: bytes = b"") -> bytes:
    return messages.authentication(struct.pack(">i", code) + data)


TALKS = {
    "silence": silent,
    "an end": saying(),
    "half an answer": saying(LOGIN[:7]),
    "half a login": saying(LOGIN[:20]),
    "half an answer, then silence": half_silent,
    "garbage": saying(b"\xff\xfe garbage \x00" * 50),
    "zeros": saying(bytes(1000)),
    "a huge length": saying(b"R\x7f\xff\xff\xff"),
    "a length below four": saying(b"R\0\0\0\3"),
    "an unknown method": saying(asking(99)),
    "a method too short": saying(b"R\0\0\0\5\0"),
    "GSS": saying(asking(7)),
    "an unknown mechanism": saying(asking(10, b"PLAIN\0\0")),
    "SASL out of turn": saying(asking(11, b"r=x,s=eA==,i=1")),
    "a foreign nonce": saying(
        asking(10, b"SCRAM-SHA-256\0\0"), asking(11, b"r=x,s=eA==,i=4096")
    ),
    "a bad salt": saying(asking(10, b"SCRAM-SHA-256\0\0"), asking(11, b"r=x,s=!,i=-1")),
    "md5 without salt": saying(asking(5), b""),
    "a refusal": saying(
        messages.plain_error("28P01", "no entry for 127.0.0.1 user anna bird")
    ),
    "a refusal without fields": saying(messages.message(b"E", b"\0")),
    "an unended refusal": saying(messages.message(b"E", b"Sfatal")),
    "a setting without end": saying(
        messages.AUTHENTICATION_OK + messages.message(b"S", b"a")
    ),
    "a setting without value": saying(
        messages.AUTHENTICATION_OK + messages.message(b"S", b"a\0")
    ),
    "no end of settings": endless,
}


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS.keys())
def test_a_server_that_can_not_log_us_in_is_refused_in_time(
    brisk: Proxy, places: Places, talk: Callable[[socket.socket], None]
) -> None:
    before = brisk.log.stat().st_size
    name, listening = places.take("transaction")
    number = port(listening)
    with FakeServer(talk, listening) as server:
        refused(places.tenant, name, str(number))
        assert server.count >= 1
    written = brisk.log.read_bytes()[before:].decode()
    assert "Traceback" not in written, written


ANSWERS = {
    "an end": b"",
    "half a row": b"D\0\0\1\0\0\1",
    "half a large row": b"D\0\xff\xff\xff" + bytes(100_000),
    "garbage": b"\xff\xfe garbage \x00" * 50,
    "a huge length": b"T\x7f\xff\xff\xff",
    "a length below four": b"T\0\0\0\0",
    "a stray ParseComplete": b"1\0\0\0\4",
    "two ends": messages.READY_IDLE * 2,
    "a long end": b"Z\0\0\0\6II",
    "a fatal error": messages.message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mbye\0\0"),
    "an error without fields": messages.message(b"E", b"\0"),
    "a setting without a name": b"S\0\0\0\4",
    "an unended error": messages.message(b"E", b"SERROR\0C2200"),
}


@each_mode
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_a_server_that_answers_nonsense_ends_its_client_only(
    brisk: Proxy, places: Places, mode: str, answer: bytes
) -> None:
    before = brisk.log.stat().st_size
    name, listening = places.take(mode)
    with FakeServer(saying(LOGIN, answer), listening):
        with RawClient.logged_in(places.tenant, name) as client:
            client.send(messages.query("SELECT 1"))
            told = client.to_end()
    errors = [messages.read_fields(body) for kind, body in told if kind == b"E"]
    for fields in errors[-1:]:
        assert fields.get("C", "08006") in ("08006", "08P01", "57P01", "2200")
    # Inside of a message that was passed on in part, nothing can be told.
    assert errors or answer.startswith((b"D", b"Z"))
    with places.tenant.connect(mode) as beside:
        assert beside.execute("SELECT 1").fetchone() == (1,)
    written = brisk.log.read_bytes()[before:].decode()
    assert "Traceback" not in written, written


def resetting(connected: socket.socket) -> None:
    """Log a client in, then answer as a machine does that lost its memory."""
    connected.recv(65536)
    connected.sendall(LOGIN)
    connected.recv(65536)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@each_mode
def test_a_server_whose_machine_forgot_it_ends_its_client_only(
    brisk: Proxy, places: Places, mode: str
) -> None:
    name, listening = places.take(mode)
    with FakeServer(resetting, listening):
        with RawClient.logged_in(places.tenant, name) as client:
            client.send(messages.query("SELECT 1"))
            fields = client.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "08006")
    with places.tenant.connect(mode) as beside:
        assert beside.execute("SELECT 1").fetchone() == (1,)


def unending(connected: socket.socket) -> None:
    """Answer a query in full, but for ReadyForQuery."""
    connected.recv(65536)
    connected.sendall(LOGIN)
    while connected.recv(65536):
        connected.sendall(messages.message(b"C", b"SELECT 1\0"))


@each_mode
def test_a_server_that_never_ends_its_answer_goes_with_its_client(
    brisk: Proxy, places: Places, mode: str
) -> None:
    name, listening = places.take(mode)
    before = status(places.tenant)
    with FakeServer(unending, listening):
        with RawClient.logged_in(places.tenant, name) as client:
            client.send(messages.query("SELECT 1"))
            assert client.receive() == (b"C", b"SELECT 1\0")
        # A cancel request is answered by nobody, and given up after a while.
        eventually(lambda: status(places.tenant)["clients"] <= before["clients"])
        eventually(lambda: status(places.tenant)["servers"] <= before["servers"])


def test_metrics_name_no_target_that_failed(brisk: Proxy) -> None:
    for name in samples(brisk):
        assert not re.search(r"127\.0\.0\.1|anna", name)
