"""Much data, slow readers, slow writers: all of it arrives, none of it piles up."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import MODES, Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    COPY_DONE,
    SYNC,
    Wire,
    bind,
    copy_data,
    execute,
    kinds,
    message,
    parse,
    query,
)

MB = 1 << 20
#: What the proxy may grow by while it holds someone's data back, in kB.
MAX_GROWTH = 10_000


@pytest.fixture(scope="module")
def relaying(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy whose memory nobody else uses."""
    proxy = Proxy(postgres, tmp_path_factory.mktemp("volume"))
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def tenant(relaying: Proxy) -> Organization:
    made = relaying.create_organization(limiter=LimiterMode.OFF)
    with psycopg.connect(made.direct_dsn, autocommit=True) as connection:
        connection.execute("CREATE UNLOGGED TABLE load (text text)")
    for mode in MODES:  # so that start-up costs are not part of any growth
        with made.connect(str(mode)) as connection:
            connection.execute("SELECT 1", prepare=True)
    return made


class Growth:
    """The most that the proxy's memory grew by, sampled until asked."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._before = self._most = proxy.memory_kb
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, self._proxy.memory_kb)

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return max(self._most, self._proxy.memory_kb) - self._before


@pytest.fixture
def growth(tenant: Organization) -> Iterator[Growth]:
    made = Growth(tenant.proxy)
    yield made
    made.end()


def wait_until_stalled(proxy: Proxy) -> None:
    """Wait until the proxy relays nothing more for a while."""
    before, quiet = -1, 0
    end = time.monotonic() + 20
    while quiet < 10:
        assert time.monotonic() < end, "the proxy goes on reading"
        time.sleep(0.02)
        now = cpu_ticks(proxy)
        quiet = quiet + 1 if now == before else 0
        before = now


def cpu_ticks(proxy: Proxy) -> int:
    assert proxy.process is not None
    with open(f"/proc/{proxy.process.pid}/stat") as stat:
        fields = stat.read().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("mode", MODES)
def test_100_mb_wait_in_the_database_for_a_reader_that_stalls(
    tenant: Organization, growth: Growth, mode: PoolMode
) -> None:
    with Wire(tenant.dsn(str(mode)), timeout=30) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        wire.send(query("SELECT repeat('x', 100000) FROM generate_series(1, 1000)"))
        wait_until_stalled(tenant.proxy)
        with tenant.connect("transaction") as other:  # nobody else is held up
            assert other.execute("SELECT 1").fetchone() == (1,)
        size = count = 0
        while (got := wire.receive()).kind != "Z":
            size += len(got.body)
            count += got.kind == "D"
        assert count == 1000
        assert size > 100_000_000
    assert growth.end() < MAX_GROWTH


def test_one_row_of_60_mb_is_streamed(tenant: Organization, growth: Growth) -> None:
    with Wire(tenant.dsn("transaction"), timeout=30) as wire:
        got = wire.ask(query("SELECT repeat('0123456789', 6000000)"))
        assert kinds(got) == "TDCZ"
        assert got[1].body[6:] == b"0123456789" * 6_000_000
        assert kinds(wire.ask(query("SELECT 1"))) == "TDCZ"
    assert growth.end() < MAX_GROWTH


@pytest.mark.parametrize("name", ["", "named"])
def test_one_parameter_of_60_mb_is_streamed(
    tenant: Organization, growth: Growth, name: str
) -> None:
    value = b"abcdefghij" * 6_000_000
    with Wire(tenant.dsn("transaction"), timeout=30) as wire:
        wire.ask(parse("SELECT md5($1::text)", name), SYNC)
        for _ in range(2):
            got = wire.ask(bind((value,), name), execute(), SYNC)
            assert kinds(got) == "2DCZ"
            assert got[1].body[6:].decode() == hashlib.md5(value).hexdigest()
    assert growth.end() < MAX_GROWTH


def test_one_query_text_of_60_mb_is_streamed(
    tenant: Organization, growth: Growth
) -> None:
    with Wire(tenant.dsn("transaction"), timeout=30) as wire:
        got = wire.ask(query("SELECT length('" + "y" * 60_000_000 + "')"))
        assert got[1].body[6:] == b"60000000"
    assert growth.end() < MAX_GROWTH


@pytest.mark.parametrize("mode", MODES)
def test_50_mb_of_copy_wait_in_the_client_for_a_server_that_stalls(
    tenant: Organization, growth: Growth, mode: PoolMode
) -> None:
    part = copy_data(b"z" * 999 + b"\n") * 1000
    with (
        psycopg.connect(tenant.direct_dsn) as blocker,
        Wire(tenant.dsn(str(mode)), timeout=60) as wire,
    ):
        wire.ask(query("TRUNCATE load"))
        # The trigger keeps the server from its input until the lock is free.
        blocker.execute("SELECT pg_advisory_lock(50)")
        wire.ask(query(WAITING))
        wire.send(query("COPY load FROM STDIN"))
        wire.until("G")
        sent = Sender(wire, part, 50)
        wait_until_stalled(tenant.proxy)
        assert sent.parts < 50, "all was taken while the server took nothing"
        blocker.execute("SELECT pg_advisory_unlock(50)")
        sent.thread.join(60)
        wire.send(COPY_DONE)
        answer = wire.until("Z")
        assert answer[0].body == b"COPY 50000\0"
        wire.ask(query("DROP TRIGGER wait ON load"))
    assert growth.end() < MAX_GROWTH


WAITING = """
CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock_shared(50); RETURN NULL; END $$;
CREATE TRIGGER wait BEFORE INSERT ON load FOR EACH STATEMENT EXECUTE FUNCTION wait()
"""


class Sender:
    """Sends the same bytes again and again, from a thread of its own."""

    def __init__(self, wire: Wire, data: bytes, count: int) -> None:
        self.parts = 0
        self._wire, self._data, self._count = wire, data, count
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self) -> None:
        for _ in range(self._count):
            self._wire.send(self._data)
            self.parts += 1


def test_pipelined_queries_wait_in_a_client_that_does_not_read(
    tenant: Organization, growth: Growth
) -> None:
    request = query("SELECT repeat('q', 20000)") * 100
    with Wire(tenant.dsn("transaction"), timeout=30) as wire:
        sent = Sender(wire, request, 20)
        wait_until_stalled(tenant.proxy)
        for _ in range(2000):
            got = wire.until("Z")
            assert kinds(got) == "TDCZ"
        sent.thread.join(30)
    assert growth.end() < MAX_GROWTH


MILLION = "COPY (SELECT n, md5(n::text) FROM generate_series(1, 1000000) n) TO STDOUT"
READY = b"Z\0\0\0\5I"


def digest(dsn: str, sql: str) -> str:
    """The hash of all bytes that answer a query."""
    summed = hashlib.sha256()
    tail = b""
    with Wire(dsn, timeout=30) as wire:
        wire.send(query(sql))
        while tail != READY:
            part = wire.sock.recv(MB)
            assert part, "the answer has no end"
            summed.update(part)
            tail = (tail + part)[-len(READY) :]
    return summed.hexdigest()


@pytest.fixture(scope="module")
def direct_digest(tenant: Organization) -> str:
    return digest(tenant.direct_dsn, MILLION)


@pytest.mark.parametrize("mode", MODES)
def test_a_million_rows_are_copied_out_unchanged(
    tenant: Organization, direct_digest: str, mode: PoolMode
) -> None:
    assert digest(tenant.dsn(str(mode)), MILLION) == direct_digest


def test_copy_data_of_60_mb_in_one_message(
    tenant: Organization, growth: Growth
) -> None:
    with Wire(tenant.dsn("transaction"), timeout=30) as wire:
        wire.ask(query("TRUNCATE load"))
        wire.send(query("COPY load FROM STDIN"))
        wire.until("G")
        wire.send(message(b"d", (b"w" * 59_999 + b"\n") * 1000) + COPY_DONE)
        assert wire.until("Z")[0].body == b"COPY 1000\0"
    assert growth.end() < MAX_GROWTH
