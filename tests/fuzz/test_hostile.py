"""Bytes that nobody should send: before login, after it, and to the parsers.

The proxy answers with one clear error or closes; it never dies, never logs a
traceback, and costs a client beside nothing.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ogelproxy._wire import split
from ogelproxy.errors import NotSupported, ProtocolViolation
from ogelproxy.protocol import messages, startup
from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, eventually, kinds, status, unharmed
from tests.fixtures.postgres import Postgres

SYNC = b"S\0\0\0\4"
HUGE = 0x7FFFFFFF
#: Lengths that a message can't have: it counts its own four bytes.
IMPOSSIBLE = (-(2**31), -1, 0, 1, 2, 3, HUGE)

#: A short session of every kind of request, each complete by itself.
SESSION = b"".join(
    (
        messages.query("SELECT 1"),
        messages.message(b"P", b"s\0SELECT $1::int4\0\0\0"),
        messages.message(b"B", b"p\0s\0\0\0\0\1\0\0\0\17\0\0"),
        messages.message(b"D", b"Pp\0"),
        messages.message(b"E", b"p\0\0\0\0\0"),
        messages.message(b"C", b"Pp\0"),
        messages.message(b"H", b""),
        SYNC,
        messages.message(b"C", b"Ss\0"),
        SYNC,
        messages.query("BEGIN; SELECT 2"),
        messages.query("ROLLBACK"),
    )
)


def shortly(data: object) -> str | None:
    """Name a case by its first bytes."""
    return repr(data[:16])[2:-1] if isinstance(data, bytes) else None


@pytest.fixture(scope="module")
def hasty(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy that gives a client one second to log in."""
    directory: Path = tmp_path_factory.mktemp("hasty")
    proxy = Proxy(postgres, directory, {"OGELPROXY_LISTEN_LOGIN_TIMEOUT": "1"})
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def member(hasty: Proxy) -> Organization:
    return hasty.create_organization(limiter=LimiterMode.OFF)


# Before login.


@pytest.mark.parametrize(
    "packet",
    [
        *(struct.pack(">i", length) + bytes(16) for length in IMPOSSIBLE),
        *(struct.pack(">i", length) + bytes(16) for length in range(4, 8)),
        struct.pack(">ii", 10_005, 196608) + bytes(9_997),
        struct.pack(">ii", 1 << 24, 196608) + b"user\0x\0" * 2000,
        b"GET / HTTP/1.1\r\nHost: proxy\r\n\r\n",
    ],
    ids=shortly,
)
def test_a_first_packet_of_impossible_length_is_closed_without_an_answer(
    hasty: Proxy, packet: bytes
) -> None:
    with RawClient(hasty) as client:
        client.send(packet)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.to_end() == []


@pytest.mark.parametrize(
    "packet",
    [
        struct.pack(">ii", 8, 0),
        struct.pack(">ii", 8, 2 << 16),
        struct.pack(">ii", 9, 4 << 16) + b"\0",
        struct.pack(">ii", 8, 196608),
        struct.pack(">ii", 9, 196608) + b"\0",
        struct.pack(">ii", 14, 196608) + b"user\0\0",
        struct.pack(">ii", 16, 196608) + b"user\0org",
        struct.pack(">ii", 19, 196608) + b"user\0org_x\0",
        struct.pack(">ii", 9, startup.SSL_REQUEST) + b"x",
        struct.pack(">ii", 12, messages.CANCEL_REQUEST) + bytes(4),
        struct.pack(">ii", 300, messages.CANCEL_REQUEST) + bytes(292),
        struct.pack(">ii", 8, startup.SSL_REQUEST) * 2,
        struct.pack(">ii", 8, startup.SSL_REQUEST) + b"early",
    ],
    ids=shortly,
)
def test_a_first_packet_that_can_not_be_is_answered_and_closed(
    hasty: Proxy, packet: bytes
) -> None:
    with RawClient(hasty) as client:
        client.send(packet)
        fields = messages.read_fields(client.receive()[1])
        assert fields["S"] == "FATAL"
        # As Postgres, for a version that isn't 3.
        assert fields["C"] in ("08P01", "0A000")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.to_end() == []


def test_garbage_is_never_answered_with_more_than_one_error(hasty: Proxy) -> None:
    garbage = bytes(range(256)) * 40
    for at in range(0, 256, 8):
        with RawClient(hasty) as client:
            client.send(garbage[at:])
            client.socket.shutdown(socket.SHUT_WR)
            assert len(client.to_end()) <= 1


def test_a_client_that_says_nothing_is_closed_while_others_are_served(
    hasty: Proxy,
) -> None:
    organization = hasty.create_organization(limiter=LimiterMode.OFF)
    handle = organization.handle
    start = messages.startup({"user": handle, "database": "app"})
    openings = [b"", b"\0", start[:4], start[:20], start, start + b"p\0\0\0\x20SCRAM"]
    silent = [RawClient(hasty) for _ in openings * 5]
    for client, opening in zip(silent, openings * 5, strict=True):
        client.send(opening)
    with unharmed(hasty, organization):
        for client in silent:
            assert client.refusal()["M"] == "login took too long"
            client.close()


@pytest.mark.parametrize(
    "answer",
    [
        *(b"p" + struct.pack(">i", length) + bytes(64) for length in IMPOSSIBLE),
        b"p" + struct.pack(">i", 20_001) + bytes(20_000),
        messages.message(b"p", b""),
        messages.message(b"p", b"SCRAM-SHA-256"),
        messages.message(b"p", b"SCRAM-SHA-256\0"),
        messages.message(b"p", b"SCRAM-SHA-256\0" + struct.pack(">i", -1)),
        messages.message(b"p", b"SCRAM-SHA-256\0" + struct.pack(">i", HUGE) + b"n,,"),
        messages.message(b"p", b"SCRAM-SHA-256\0\0\0\0\4n,,\xff"),
        messages.message(b"p", b"SCRAM-SHA-1\0\0\0\0\4n,,n"),
        messages.query("SELECT 1"),
        SYNC,
        b"\xff" * 64,
    ],
    ids=shortly,
)
def test_a_login_answer_that_can_not_be_is_refused(
    hasty: Proxy, member: Organization, answer: bytes
) -> None:
    with RawClient(hasty) as client:
        client.start(member.handle, "app")
        assert client.receive()[0] == b"R"
        client.send(answer)
        fields = client.refusal()
        assert fields["S"] == "FATAL"
        assert fields["C"] in ("08P01", "28P01", "28000")


def test_two_hundred_clients_of_garbage_cost_no_memory_and_harm_nobody(
    proxy: Proxy, organization: Organization
) -> None:
    # Once before, so that what is made at first use is there.
    flood(proxy, organization, 20)
    before = proxy.memory_kb
    with unharmed(proxy, organization):
        flood(proxy, organization, 200)
    assert proxy.memory_kb - before < 20_000


def flood(proxy: Proxy, organization: Organization, count: int) -> None:
    opening = messages.startup({"user": organization.handle, "database": "app"})
    clients = [RawClient(proxy) for _ in range(count)]
    for number, client in enumerate(clients):
        # A third in the first packet, a third in the login, the rest half-way.
        client.send(opening[: (0, len(opening), 12)[number % 3]])
        client.socket.setblocking(False)
        try:
            while client.socket.send(b"\x7fgarbage" * 8192) == 65536:
                pass
        except OSError:
            pass
    for client in clients:
        client.close()


# After login.


@pytest.mark.parametrize("mode", ["session", "transaction", "auto"])
@pytest.mark.parametrize(
    "data",
    [
        *(b"Q" + struct.pack(">i", length) for length in IMPOSSIBLE),
        *(b"d" + struct.pack(">i", length) for length in IMPOSSIBLE),
        messages.message(b"p", b"again\0"),
        messages.message(b"R", bytes(4)),
        messages.message(b"\0", b""),
        messages.message(b"\xff", b"x" * 100),
        messages.message(b"Z", b"I"),
        messages.message(b"P", b"no end"),
        messages.message(b"B", b"no end"),
        messages.message(b"B", b"portal\0no end"),
        messages.message(b"D", b""),
        messages.message(b"D", b"S"),
        messages.message(b"D", b"Sno end"),
        messages.message(b"C", b""),
        messages.message(b"C", b"Pno end"),
        messages.message(b"E", b""),
        messages.message(b"E", b"\0\0"),
        messages.message(b"D", b"S" + b"x" * (2 << 20) + b"\0"),
        b"\x00" * 4096,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=shortly,
)
def test_a_message_that_can_not_be_ends_the_connection_with_one_error(
    organization: Organization, mode: str, data: bytes
) -> None:
    with RawClient.logged_in(organization, mode) as client:
        client.send(data)
        fields = client.refusal()
        assert (fields["S"], fields["C"]) == ("FATAL", "08P01")


@pytest.mark.parametrize(
    "data",
    [
        messages.message(b"d", b"rows"),
        messages.message(b"c", b""),
        messages.message(b"f", b"reason\0"),
        messages.message(b"d", b"x" * 300_000),
        messages.message(b"H", b""),
    ],
    ids=shortly,
)
def test_copy_messages_outside_of_copy_are_ignored_as_postgres_does(
    organization: Organization, data: bytes
) -> None:
    for mode in organization.databases:
        with RawClient.logged_in(organization, mode) as client:
            client.send(data)
            assert kinds(client.query("SELECT 1")) == "TDCZ"
            client.query("BEGIN")
            client.send(data)
            assert kinds(client.query("SELECT 1")) == "TDCZ"


def test_a_session_cut_at_any_offset_harms_nobody(
    proxy: Proxy, organization: Organization
) -> None:
    with unharmed(proxy, organization):
        for at in range(len(SESSION)):
            client = RawClient.logged_in(organization, "transaction")
            client.send(SESSION[:at])
            if at % 2:
                client.reset()
            else:
                client.close()
        with RawClient.logged_in(organization, "transaction") as client:
            client.send(SESSION)
            assert client.query("SELECT 3")[-1] == (b"Z", b"I")


def test_a_client_that_never_reads_its_refusals_costs_no_memory(proxy: Proxy) -> None:
    poor = proxy.create_organization(tier="free")
    with RawClient.logged_in(poor) as client:
        before = proxy.memory_kb
        stuff(client, messages.query("SELECT 1"))
        # What is owed at once (MAX_OWED) may take some 20 MB.
        assert proxy.memory_kb - before < 30_000
        # It is read from again once it reads.
        client.socket.settimeout(10)
        while client.receive()[0] != b"Z":
            pass


def test_a_client_that_never_reads_what_the_proxy_answers_itself_costs_no_memory(
    proxy: Proxy, organization: Organization
) -> None:
    parse = messages.message(b"P", b"same\0SELECT 1\0\0\0")
    close = messages.message(b"C", b"Ssame\0")
    with RawClient.logged_in(organization, "transaction") as client:
        client.send(parse + SYNC)
        client.until(b"Z")
        before = proxy.memory_kb
        stuff(client, close + parse)
        assert proxy.memory_kb - before < 20_000


def stuff(client: RawClient, data: bytes) -> None:
    """Send `data` over and over, until it is no longer read."""
    client.socket.settimeout(1)
    piece = data * (65536 // len(data))
    with pytest.raises(TimeoutError):
        for _ in range(1000):
            client.send(piece)


def test_names_of_statements_are_bounded_however_they_are_cut(
    organization: Organization,
) -> None:
    parse = messages.message(b"P", b"n" * 100_000 + b"\0SELECT 1\0\0\0")
    bind = messages.message(b"B", b"\0" + b"n" * 100_000 + b"\0" + bytes(6))
    for data in (parse, bind):
        for size in (1000, 4096, len(data)):
            with RawClient.logged_in(organization, "transaction") as client:
                try:
                    for at in range(0, len(data), size):
                        client.send(data[at : at + size])
                except ConnectionError:
                    pass
                assert client.refusal()["C"] == "08P01"


KINDS = b"QPBECDSHFXdcfp\0\xff"
framed = st.builds(
    lambda kind, body: messages.message(bytes([kind]), body),
    st.sampled_from(KINDS),
    st.binary(max_size=60),
)
garbage = st.lists(framed | st.binary(max_size=40), max_size=12).map(b"".join)
mutated = st.builds(
    lambda at, size, new: SESSION[:at] + new + SESSION[at + size :],
    st.integers(0, len(SESSION)),
    st.integers(0, 12),
    st.binary(max_size=12),
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=garbage | mutated, cut=st.integers(1, 64))
def test_any_bytes_after_login_harm_nobody(
    proxy: Proxy, organization: Organization, data: bytes, cut: int
) -> None:
    with unharmed(proxy, organization):
        for mode in ("transaction", "auto"):
            with RawClient.logged_in(organization, mode) as client:
                try:
                    for at in range(0, len(data), cut):
                        client.send(data[at : at + cut])
                    # Not connected, when the proxy was the first to end it.
                    with contextlib.suppress(OSError):
                        client.socket.shutdown(socket.SHUT_WR)
                    client.to_end()
                except ConnectionError:
                    pass


def test_no_connection_of_the_hostile_stays(proxy: Proxy) -> None:
    organization = proxy.create_organization(limiter=LimiterMode.OFF)
    for data in (b"\xff" * 64, SESSION[:-3], SYNC * 1000, b"Q\0\0\0\xff"):
        RawClient.logged_in(organization, "transaction").send(data)
    eventually(lambda: status(organization)["clients"] == 0)


# The parsers.


@given(packet=st.binary(min_size=8, max_size=200))
@example(packet=struct.pack(">ii", 9, 196608) + b"\0")
@example(packet=struct.pack(">ii", 8, 196608))
def test_any_first_packet_parses_or_is_a_violation(packet: bytes) -> None:
    try:
        startup.parse(packet)
    except ProtocolViolation as error:
        assert error.by == "client"
    except NotSupported:
        assert packet[4:6] != b"\0\3"


@given(
    words=st.lists(st.text(max_size=12), max_size=9),
    options=st.text(alphabet="-c =\\ab\t\n", max_size=30),
)
def test_any_parameters_parse_or_are_a_violation(
    words: list[str], options: str
) -> None:
    body = "\0".join(["user", "org_a", "options", options, *words, "", ""])
    packet = struct.pack(">ii", 0, 196608) + body.encode()
    try:
        read = startup.parse(packet)
    except ProtocolViolation:
        return
    assert isinstance(read, startup.Startup)


@given(head=st.binary(min_size=4, max_size=4))
def test_any_length_of_a_first_packet_is_in_bounds_or_a_violation(head: bytes) -> None:
    try:
        assert 8 <= startup.packet_size(head) <= startup.MAX_STARTUP_BYTES
    except ProtocolViolation:
        assert not 8 <= int.from_bytes(head, "big") <= startup.MAX_STARTUP_BYTES


@given(data=st.binary(max_size=60) | garbage)
def test_frames_whole_or_byte_by_byte_are_the_same(data: bytes) -> None:
    assert fed([data]) == fed([data[i : i + 1] for i in range(len(data))])


def fed(parts: list[bytes]) -> tuple[list[tuple[bytes, bytes]], bytes] | None:
    """Split what comes in parts; None when it holds what can't be."""
    frames: list[tuple[bytes, bytes]] = []
    rest = b""
    for part in parts:
        try:
            more, rest = split(rest + part)
        except ProtocolViolation:
            return None
        frames += more
    return frames, rest
