"""Replication through the proxy: logical and physical, with the programs that do it."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import psycopg2
import psycopg2.extras
import pytest
from psycopg import sql

from ogelproxy.config import Secret
from ogelproxy.embedded import find_binaries
from ogelproxy.protocol import messages
from ogelproxy.tenants.model import DatabaseType, PoolMode
from tests.fixtures import wire
from tests.fixtures.engine import ACTOR, Organization, Proxy
from tests.fixtures.faults import RawClient, eventually, kinds, status
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import COPY_DONE, Wire, query

#: The database that pg_receivewal and pg_basebackup name, whatever they are told.
PHYSICAL = "replication"


class Source:
    """An organisation whose databases `app` and `replication` can be replicated."""

    def __init__(self, proxy: Proxy, publisher: Postgres, tier: str) -> None:
        self.member = proxy.create_organization(tier=tier, modes=(PoolMode.SESSION,))
        self.role = publisher.create_role()
        self.name = publisher.create_database(owner=self.role)
        self._admin = publisher.dsn(self.name)
        self.execute(
            sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(self.role))
        )
        self.execute("CREATE TABLE item (id int PRIMARY KEY, words text)")
        self.execute("CREATE PUBLICATION items FOR TABLE item")
        dsn = Secret(publisher.dsn(self.name, self.role))
        modes = {PHYSICAL: PoolMode.SESSION, "logical": PoolMode.SESSION}
        modes |= {str(mode): mode for mode in PoolMode if mode is not PoolMode.SESSION}
        asyncio.run(self._add(modes, dsn))

    async def _add(self, modes: dict[str, PoolMode], dsn: Secret) -> None:
        async with self.member.proxy.store() as store:
            for name, mode in modes.items():
                await store.create_database(
                    self.member.handle,
                    name,
                    DatabaseType.POSTGRES,
                    dsn,
                    mode,
                    actor=ACTOR,
                )

    def execute(self, statement: Any, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement without the proxy, as superuser."""
        with psycopg.connect(self._admin, autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def walsenders(self) -> int:
        ((count,),) = self.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'walsender' AND usename = %s",
            self.role,
        )
        return int(count)

    def slot(self) -> str:
        """Make a slot for pgoutput and return its name."""
        name = f"slot_{uuid4().hex[:8]}"
        self.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", name)
        return name

    def drop(self, slot: str) -> None:
        """Drop a slot once nobody uses it: others would wait for its WAL."""
        eventually(lambda: self.walsenders() == 0)
        self.execute("SELECT pg_drop_replication_slot(%s)", slot)


@pytest.fixture(scope="module")
def source(proxy: Proxy, publisher: Postgres) -> Source:
    return Source(proxy, publisher, "enterprise")


@pytest.fixture
def slot(source: Source) -> Iterator[str]:
    name = source.slot()
    try:
        yield name
    finally:
        source.drop(name)


def replicate(source: Source) -> Any:
    return psycopg2.connect(
        source.member.dsn("logical"),
        connection_factory=psycopg2.extras.LogicalReplicationConnection,
    )


def begin(source: Source, slot: str, database: str = "logical") -> RawClient:
    """A raw client to which changes are streamed."""
    client = RawClient(source.member.proxy)
    parameter = {"replication": "database", "database": database}
    client.send(messages.startup({"user": source.member.handle, **parameter}))
    client.authenticate(source.member.key)
    client.greeted()
    client.send(
        messages.query(
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 "
            "(proto_version '1', publication_names 'items')"
        )
    )
    assert kinds(client.until(b"W")) == "W"
    return client


# Logical.


def test_changes_arrive_and_are_confirmed(source: Source, slot: str) -> None:
    received: list[bytes] = []

    def consume(change: Any) -> None:
        received.append(change.payload)
        change.cursor.send_feedback(flush_lsn=change.data_start, force=True)
        if change.payload[:1] == b"C":
            raise psycopg2.extras.StopReplication

    with closing(replicate(source)) as connection, connection.cursor() as cursor:
        cursor.start_replication(
            slot_name=slot,
            options={"proto_version": "1", "publication_names": "items"},
        )
        source.execute("INSERT INTO item VALUES (1, 'first'), (2, 'second')")
        with pytest.raises(psycopg2.extras.StopReplication):
            cursor.consume_stream(consume)
        assert b"".join(each[:1] for each in received) == b"BRIIC"
        assert b"second" in received[3]
        confirmed = "SELECT confirmed_flush_lsn > restart_lsn FROM "
        eventually(
            lambda: (
                source.execute(
                    confirmed + "pg_replication_slots WHERE slot_name = %s", slot
                )
                == [(True,)]
            )
        )


def test_sql_runs_on_a_logical_connection(source: Source) -> None:
    with closing(replicate(source)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT current_user, 6 * 7")
        assert cursor.fetchall() == [(source.role, 42)]
        cursor.execute("IDENTIFY_SYSTEM")
        assert cursor.fetchone()[3] == source.name


def test_stream_is_ended_and_begun_again_as_by_postgres(
    source: Source, slot: str, publisher: Postgres
) -> None:
    begin_stream = query(
        f"START_REPLICATION SLOT {slot} LOGICAL 0/0 "
        "(proto_version '1', publication_names 'items')"
    )
    transcripts = []
    direct = publisher.dsn(source.name, source.role)
    for dsn in (direct, source.member.dsn("logical")):
        with Wire(dsn, {"replication": "database"}) as client:
            transcripts.append("")
            for request in (begin_stream, begin_stream, query("SELECT 42"), query("x")):
                client.send(request)
                if request is begin_stream:
                    client.until("W")
                    client.send(COPY_DONE)
                # What is streamed meanwhile, and whether its end is told, is chance.
                said = wire.kinds(client.until("Z"))
                transcripts[-1] += said.replace("d", "").replace("c", "")
        eventually(lambda: source.walsenders() == 0)
    assert transcripts[0] == transcripts[1] == "CCZCCZTDCZEZ"


def test_cancel_request_ends_the_stream(source: Source, slot: str) -> None:
    with begin(source, slot) as client, RawClient(source.member.proxy) as canceler:
        canceler.send(messages.cancel_request(client.process_id, client.secret))
        assert canceler.to_end() == []
        (error,) = (body for kind, body in client.until(b"Z") if kind == b"E")
        assert messages.read_fields(error)["C"] == "57014"


def test_slow_reader_holds_the_stream_back(source: Source, slot: str) -> None:
    size, count = 100_000, 600
    proxy = source.member.proxy
    with begin(source, slot) as client:
        before = proxy.memory_kb
        source.execute(
            "INSERT INTO item SELECT 1000 + n, repeat('x', %s) "
            "FROM generate_series(1, %s) AS n",
            size,
            count,
        )
        waits = "SELECT wait_event FROM pg_stat_activity WHERE usename = %s"
        eventually(
            lambda: source.execute(waits, source.role) == [("WalSenderWriteData",)]
        )
        assert proxy.memory_kb - before < 10_000
        received = 0
        while received < size * count:
            kind, body = client.receive()
            assert kind == b"d"
            received += body.count(b"x")
    source.execute("DELETE FROM item")


@pytest.mark.parametrize("ending", ["terminate", "close", "reset"])
def test_walsender_ends_with_its_client(source: Source, slot: str, ending: str) -> None:
    client = begin(source, slot)
    assert source.walsenders() == 1
    if ending == "terminate":
        client.send(messages.TERMINATE)
    elif ending == "reset":
        client.reset()
    else:
        client.close()
    eventually(lambda: source.walsenders() == 0)
    eventually(lambda: status(source.member)["servers"] == 0)
    client.close()


def test_idle_walsender_is_nobody_elses_either(source: Source) -> None:
    with closing(replicate(source)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
        with source.member.connect("logical") as beside:
            row = beside.execute("SELECT pg_backend_pid()").fetchone()
            assert row is not None
            assert row[0] != pid
            kind = beside.execute(
                "SELECT backend_type FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            ).fetchone()
            assert kind == ("client backend",)
    eventually(lambda: source.walsenders() == 0)


def test_start_up_settings_arrive(source: Source) -> None:
    with closing(
        psycopg2.connect(
            source.member.dsn("logical"),
            connection_factory=psycopg2.extras.LogicalReplicationConnection,
            application_name="a subscriber",
            options="-c work_mem=1234kB",
        )
    ) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('work_mem')")
            assert cursor.fetchone() == ("1234kB",)
        assert connection.get_parameter_status("application_name") == "a subscriber"


# Physical.


def run(name: str, *arguments: str) -> str:
    """Run one of Postgres' programs to its end; return what it said."""
    done = subprocess.run(
        [str(find_binaries(os.environ) / name), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_pg_receivewal_receives(source: Source, tmp_path: Path) -> None:
    dsn = source.member.dsn(PHYSICAL)
    slot = f"wal_{uuid4().hex[:8]}"
    source.execute("SELECT pg_create_physical_replication_slot(%s, true)", slot)
    try:
        source.execute("INSERT INTO item VALUES (78, 'behind the slot')")
        ((end,),) = source.execute("SELECT pg_switch_wal()")
        arguments = ("-D", str(tmp_path), "-S", slot, f"--endpos={end}", "--no-loop")
        run("pg_receivewal", "-d", dsn, *arguments)
        logs = [path.read_bytes() for path in tmp_path.iterdir()]
        assert any(b"behind the slot" in log for log in logs)
    finally:
        source.execute("DELETE FROM item")
        eventually(lambda: source.walsenders() == 0)
        run("pg_receivewal", "-d", dsn, "-S", slot, "--drop-slot")


def test_pg_basebackup_copies_a_whole_server(source: Source, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    dsn = source.member.dsn(PHYSICAL)
    # Its log comes on a connection of its own, meanwhile.
    run("pg_basebackup", "-d", dsn, "-D", str(copied), "-X", "stream", "-c", "fast")
    assert (copied / "backup_manifest").exists()
    run("pg_verifybackup", str(copied))
    eventually(lambda: source.walsenders() == 0)


# Refusals.


def refusal(member: Organization, database: str, **settings: str) -> dict[str, str]:
    settings = {"replication": "database"} | settings
    return member.proxy.refusal(member.handle, member.key, database, **settings)


@pytest.mark.parametrize("mode", ["transaction", "statement", "auto"])
def test_replication_needs_session_mode(source: Source, mode: str) -> None:
    for value in ("database", "true", "on", "1", "YES", "t"):
        refused = refusal(source.member, mode, replication=value)
        assert (refused["S"], refused["C"]) == ("FATAL", "0A000")
        assert mode in refused["M"]


def test_false_is_no_replication(source: Source) -> None:
    for value in ("false", "off", "0", "NO", "f"):
        with pytest.raises(ConnectionRefusedError) as caught:
            raise ConnectionRefusedError(
                refusal(source.member, "nowhere", replication=value)
            )
        assert caught.value.args[0]["C"] == "3D000"


@pytest.mark.parametrize("value", ["o", "maybe", "Database", "2"])
def test_other_values_are_refused(source: Source, value: str) -> None:
    assert refusal(source.member, "logical", replication=value)["C"] == "08P01"


@pytest.mark.parametrize("tier", ["free", "starter"])
def test_replication_needs_a_tier_that_has_it(proxy: Proxy, tier: str) -> None:
    member = proxy.create_organization(tier=tier)
    refused = refusal(member, "session")
    assert (refused["S"], refused["C"]) == ("FATAL", "42501")
    assert refused["M"] == f"replication is not included in tier {tier}"


def test_role_without_the_right_is_refused_in_the_words_of_postgres(
    organization: Organization,
) -> None:
    refused = refusal(organization, "session")
    assert (refused["S"], refused["C"]) == ("FATAL", "42501")
    assert "WAL sender" in refused["M"]


def test_bad_setting_is_refused_in_the_words_of_postgres(source: Source) -> None:
    refused = refusal(source.member, "logical", work_mem="much")
    assert refused["C"] == "22023"
    assert refused["M"] == 'invalid value for parameter "work_mem": "much"'
    eventually(lambda: source.walsenders() == 0)


def test_stream_ends_when_the_tier_loses_replication(
    proxy: Proxy, publisher: Postgres
) -> None:
    leaving = Source(proxy, publisher, "pro")
    slot = leaving.slot()
    with begin(leaving, slot) as client:
        leaving.member.proxy.operate(
            lambda store: store.set_tier(
                leaving.member.handle, "starter", force=True, actor=ACTOR
            )
        )
        refused = client.refusal()
    assert refused["C"] == "42501"
    leaving.drop(slot)


def test_stream_does_not_keep_the_proxy_from_stopping(
    own_proxy: Proxy, publisher: Postgres
) -> None:
    own_proxy.settings["OGELPROXY_DRAIN_TIMEOUT"] = "60"
    own_proxy.start()
    own = Source(own_proxy, publisher, "enterprise")
    slot = own.slot()
    with begin(own, slot) as client:
        assert own_proxy.stop() == 0
        assert client.refusal()["C"] == "57P01"
    own.drop(slot)
