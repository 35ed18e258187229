"""The doctor before real servers and files, each in health and out of it."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import LiteralString
from urllib.parse import urlsplit

import orjson
import psycopg
import pytest
import redis
from click.testing import CliRunner, Result
from psycopg import sql

from ogelproxy import doctor
from ogelproxy.cli import main
from ogelproxy.config import Admin, Config, Control, Listen, Redis, Secret, Tls, Usage
from ogelproxy.doctor import certificate, control, machine, meeting, spool
from ogelproxy.doctor.finding import Finding, Verdict, compare_clock
from ogelproxy.tenants.model import DatabaseType
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from tests.fixtures.certificates import Authority
from tests.fixtures.faults import eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

KEY = "a passphrase of operators"
DSN = Secret("postgresql://role:password@10.0.0.1/db")
DAY = datetime.timedelta(days=1)
SPOOL_BYTES = 16 * 1024 * 1024
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

Found = dict[str, Finding]


def by_subject(findings: Iterable[Finding]) -> Found:
    found = {each.subject: each for each in findings}
    for each in found.values():
        assert "\n" not in each.text
        assert bool(each.advice) is (each.verdict is not OK), each
    return found


def all_ok(found: Found) -> bool:
    return not [each for each in found.values() if each.verdict is not OK]


class Between:
    """Sits before a server: delays what it says, or drops messages of Postgres's."""

    def __init__(self, host: str, port: int) -> None:
        self._where = (host, port)
        self.delay = 0.0  # seconds, for each part of an answer
        self.dropped = b""  # kinds of messages of a Postgres that are not passed on
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        answers, questions = await asyncio.open_connection(*self._where)
        back = self._messages if self.dropped else self._parts
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, questions))
                both.create_task(back(answers, writer))
        except* OSError:
            pass
        finally:
            writer.close()
            questions.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def _parts(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay)
            writer.write(data)
        writer.close()

    async def _messages(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                if head[:1] not in self.dropped:
                    writer.write(head + body)
        except asyncio.IncompleteReadError:
            writer.close()


class Plane:
    """A database for a control plane."""

    def __init__(self, postgres: Postgres) -> None:
        self.postgres = postgres
        self.name = postgres.create_database()

    def config(self, key: str | None = KEY, url: str = "") -> Control:
        return Control(
            database_url=Secret(url or self.postgres.dsn(self.name)),
            secret_key=None if key is None else Secret(key),
        )

    async def migrate(self) -> None:
        async with Store(self.config(), Vault(Secret(KEY))) as store:
            await store.migrate()
            await store.create_organization("org_a", "A", "pro", actor="tests")
            await store.create_database(
                "org_a", "app", DatabaseType.POSTGRES, DSN, actor="tests"
            )

    async def sql(self, statement: LiteralString | sql.Composed) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.postgres.dsn(self.name), autocommit=True
        ) as connection:
            await connection.execute(statement)

    async def examine(
        self, config: Control | None = None, now: Callable[[], float] = time.time
    ) -> Found:
        examined = control.examine(config or self.config(), now)
        return by_subject([each async for each in examined])


@pytest.fixture
async def plane(postgres: Postgres) -> Plane:
    """One that is migrated and has a credential."""
    made = Plane(postgres)
    await made.migrate()
    return made


async def test_a_control_plane_in_health_is_found_so(plane: Plane) -> None:
    found = await plane.examine()
    assert all_ok(found)
    assert list(found) == [
        "control plane version",
        "control plane writes",
        "control plane connections",
        "control plane clock",
        "control plane NOTIFY",
        "control plane schema",
        "secret key",
    ]
    assert "all 1 stored" in found["secret key"].text


async def test_a_pool_of_one_connection_is_examined_too(plane: Plane) -> None:
    config = plane.config().model_copy(update={"max_connections": 1})
    assert all_ok(await plane.examine(config))


async def test_no_url_is_one_failure(plane: Plane) -> None:
    found = await plane.examine(Control())
    assert found["control plane"].verdict is FAIL
    assert "DATABASE_URL" in found["control plane"].advice


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres:hunter22@127.0.0.1:1/none",
        "postgresql://postgres:hunter22@127.0.0.1:none/none",
    ],
)
async def test_an_unreachable_control_plane_is_one_failure_without_its_password(
    plane: Plane, url: str
) -> None:
    found = await plane.examine(plane.config(url=url))
    assert list(found) == ["control plane"]
    assert found["control plane"].verdict is FAIL
    assert "hunter22" not in str(found)


async def test_a_schema_that_is_not_there_comes_with_the_next_start(
    postgres: Postgres,
) -> None:
    found = await Plane(postgres).examine()
    assert found["control plane schema"].verdict is WARN
    assert found["control plane schema"].text == "not there yet"
    assert "nothing is stored yet" in found["secret key"].text


async def test_a_role_that_may_not_make_the_schema_is_a_failure(
    postgres: Postgres,
) -> None:
    made = Plane(postgres)
    url = postgres.dsn(made.name, postgres.create_role())
    found = await made.examine(made.config(url=url))
    assert found["control plane schema"].verdict is FAIL
    assert "GRANT CREATE" in found["control plane schema"].advice


async def test_a_missing_migration_is_told(plane: Plane) -> None:
    await plane.sql(
        "DELETE FROM platform.migrations WHERE name = "
        "(SELECT max(name) FROM platform.migrations)"
    )
    found = await plane.examine()
    assert found["control plane schema"].text == "1 migrations are missing"
    assert found["control plane schema"].verdict is WARN


async def test_a_schema_of_a_newer_release_is_told(plane: Plane) -> None:
    await plane.sql("INSERT INTO platform.migrations VALUES ('9999_future.sql')")
    found = await plane.examine()
    assert found["control plane schema"].verdict is WARN
    assert "9999_future.sql" in found["control plane schema"].text


async def test_a_read_only_control_plane_is_a_failure(plane: Plane) -> None:
    await plane.sql(
        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(
            sql.Identifier(plane.name)
        )
    )
    found = await plane.examine()
    assert found["control plane writes"].verdict is FAIL


async def test_versions_and_connections_are_judged_by_their_numbers(
    plane: Plane,
) -> None:
    async with Store(plane.config(), None) as store:
        vitals = await store.fetch_vitals()
    old = dataclasses.replace(vitals, version="13.23", major=13)
    assert control.version(old).verdict is FAIL
    full = dataclasses.replace(vitals, used_connections=vitals.max_connections - 4)
    assert control.connections(full, Control(max_connections=4)).verdict is WARN
    assert control.connections(full, Control(max_connections=3)).verdict is OK


async def test_notifications_that_do_not_arrive_are_a_failure(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ogelproxy.tenants.vitals.NOTIFY_TIMEOUT", 0.2)
    between = Between(plane.postgres.host, plane.postgres.port)
    between.dropped = b"A"  # NotificationResponse
    url = urlsplit(plane.postgres.dsn(plane.name))
    async with between.running():
        login = url.netloc.rpartition("@")[0]
        through = url._replace(
            netloc=f"{login}@127.0.0.1:{between.port}", query="sslmode=disable"
        )
        found = await plane.examine(plane.config(url=through.geturl()))
    assert found["control plane NOTIFY"].verdict is FAIL
    assert found["control plane schema"].verdict is OK


@pytest.mark.parametrize("key", [None, "short", "another passphrase of operators"])
async def test_a_key_that_does_not_decrypt_is_a_failure(
    plane: Plane, key: str | None
) -> None:
    found = await plane.examine(plane.config(key=key))
    assert found["secret key"].verdict is FAIL
    if key and len(key) > 16:
        assert found["secret key"].text.endswith("strings: org_a/app")
    assert str(key) not in found["secret key"].text.replace("org_a", "")


async def test_an_old_key_behind_a_new_one_decrypts(plane: Plane) -> None:
    key = f"another passphrase of operators,{KEY}"
    found = await plane.examine(plane.config(key=key))
    assert found["secret key"].verdict is OK


@pytest.mark.parametrize(("hours", "word"), [(1, "behind"), (-1, "ahead of")])
async def test_clocks_apart_are_told_with_their_direction(
    plane: Plane, valkey: Valkey, hours: int, word: str
) -> None:
    def now() -> float:
        return time.time() + hours * 3600

    found = await plane.examine(now=now) | await look(valkey.url, now=now)
    for subject in ("control plane clock", "redis clock"):
        assert found[subject].verdict is WARN
        assert f"3,600.0 s {word} this machine's" in found[subject].text


async def test_a_slow_answer_is_no_difference_of_clocks() -> None:
    times = iter([0.0, 10.0] * 3)

    async def ask() -> float:
        return 8.0

    finding = await compare_clock("clock", ask, lambda: next(times))
    assert finding.verdict is OK


async def look(
    url: str, now: Callable[[], float] = time.time, limit: float = 5.0
) -> Found:
    config = Redis(url=Secret(url), timeout=limit)
    return by_subject([each async for each in meeting.examine(config, now)])


async def test_a_valkey_in_health_is_found_so(valkey: Valkey) -> None:
    found = await look(valkey.url)
    # The session's may be slow while another test runs on the machine.
    found.pop("redis round trip")
    assert all_ok(found)
    assert found["redis version"].text.startswith("Valkey 9.")


async def test_without_a_redis_there_is_nothing_to_mend() -> None:
    found = by_subject([each async for each in meeting.examine(Redis(), time.time)])
    assert all_ok(found)


@pytest.mark.parametrize(
    "url", ["redis://:hunter22@127.0.0.1:1/0", "http://hunter22", "redis://:hunter22@"]
)
async def test_an_unreachable_redis_is_one_failure_without_its_password(
    url: str, valkey: Valkey
) -> None:
    where = f"{url}127.0.0.1:{valkey.port}" if url.endswith("@") else url
    found = await look(where)
    assert list(found) == ["redis"]
    assert found["redis"].verdict is FAIL
    assert "hunter22" not in str(found)


async def test_a_frozen_redis_is_a_failure_in_its_time(own_valkey: Valkey) -> None:
    own_valkey.freeze()
    found = await look(own_valkey.url, limit=0.2)
    own_valkey.thaw()
    assert found["redis"].verdict is FAIL


async def test_a_redis_that_evicts_is_a_failure(
    valkeys: Callable[..., Valkey],
) -> None:
    harmless = await look(valkeys(maxmemory_policy="allkeys-lru").url)
    assert harmless["redis eviction"].verdict is WARN
    server = valkeys(maxmemory_policy="allkeys-lru", maxmemory="100mb")
    assert (await look(server.url))["redis eviction"].verdict is FAIL


async def test_a_redis_that_is_nearly_full_is_told(
    valkeys: Callable[..., Valkey],
) -> None:
    found = await look(valkeys(maxmemory="1mb").url)
    assert found["redis memory"].verdict is WARN


async def test_an_old_redis_is_a_failure() -> None:
    assert meeting.version({"redis_version": "6.0.16"}).verdict is FAIL
    assert meeting.version({"redis_version": "6.2.14"}).verdict is OK
    assert meeting.version({"redis_version": "10.0.1"}).verdict is OK


async def test_a_redis_far_away_is_told(valkey: Valkey) -> None:
    between = Between("127.0.0.1", valkey.port)
    between.delay = 0.01
    async with between.running():
        url = valkey.url.replace(f":{valkey.port}/", f":{between.port}/")
        assert (await look(url))["redis round trip"].verdict is WARN


def test_round_trips_near_the_time_limit_are_a_failure() -> None:
    config = Redis(timeout=1.0)
    assert meeting.round_trip([0.001, 0.001, 0.4], config).verdict is OK
    assert meeting.round_trip([0.001, 0.001, 0.6], config).verdict is FAIL


async def test_a_primary_whose_replicas_may_be_lost_is_told(
    valkeys: Callable[..., Valkey],
) -> None:
    primary = valkeys(repl_diskless_sync_delay="0")
    with redis.Redis.from_url(primary.url) as client:
        replica = valkeys(
            replicaof=f"127.0.0.1 {primary.port}",
            masterauth=urlsplit(primary.url).password or "",
        )
        client.set("key", "value")
        assert client.wait(1, 10_000) == 1
        found = await look(primary.url)
        assert found["redis role"].text == "primary with 1 replicas"
        assert found["redis fail-over"].verdict is WARN
        client.config_set("min-replicas-to-write", 1)
        client.config_set("min-replicas-max-lag", 2)
        assert (await look(primary.url))["redis fail-over"].verdict is OK
    assert (await look(replica.url))["redis role"].verdict is FAIL


async def test_a_cluster_is_a_failure(valkeys: Callable[..., Valkey]) -> None:
    found = await look(valkeys(cluster_enabled="yes").url)
    assert found["redis role"].verdict is FAIL


async def test_a_snapshot_that_fails_is_a_failure(
    valkeys: Callable[..., Valkey],
) -> None:
    server = valkeys(save="3600 1")
    shutil.rmtree(server.log.with_name("data"))
    with redis.Redis.from_url(server.url) as client:
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_bgsave_in_progress"] == 0)
    assert (await look(server.url))["redis persistence"].verdict is FAIL


async def test_an_append_only_file_is_allowed(valkeys: Callable[..., Valkey]) -> None:
    found = await look(valkeys(appendonly="yes").url)
    assert found["redis persistence"].verdict is OK
    assert "append-only" in found["redis persistence"].text


@pytest.mark.parametrize(
    ("denied", "subject"), [("-eval", "redis scripts"), ("-info", "redis")]
)
async def test_a_user_without_rights_is_a_failure(
    own_valkey: Valkey, denied: str, subject: str
) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "limited", "on", ">word", "~*", "&*", "+@all", denied
        )
    found = await look(f"redis://limited:word@127.0.0.1:{own_valkey.port}/0")
    assert found[subject].verdict is FAIL
    assert denied.removeprefix("-") in found[subject].text.lower()


def look_at_spool(
    directory: Path, now: float | None = None, **settings: float
) -> Found:
    config = Usage(
        **{"spool_dir": directory, "max_spool_bytes": SPOOL_BYTES, **settings}
    )
    return by_subject(spool.examine(config, lambda: now or time.time()))


def batch(directory: Path, size: int, name: str = "0000000001.batch") -> Path:
    """A file that is as long as it has to be, in a worker's directory."""
    path = directory / "worker-1" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


def test_a_spool_in_health_is_found_so(tmp_path: Path) -> None:
    found = look_at_spool(tmp_path)
    found.pop("spool file system")  # whatever pytest's is
    assert all_ok(found)
    assert not list(tmp_path.iterdir())


def test_a_spool_that_is_not_there_will_be_made(tmp_path: Path) -> None:
    found = look_at_spool(tmp_path / "a" / "b")
    assert found["spool directory"].text == f"{tmp_path}/a/b will be made"
    assert not list(tmp_path.iterdir())


def test_a_directory_that_takes_no_files_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file" / "spool", Path("/proc/spool")):
        assert look_at_spool(directory)["spool directory"].verdict is FAIL


def test_a_full_spool_is_a_failure_and_a_nearly_full_one_is_told(
    tmp_path: Path,
) -> None:
    size = SPOOL_BYTES * 9 // 10
    batch(tmp_path, size)
    few_rows = look_at_spool(tmp_path, max_rows=256)
    assert few_rows["spool size"].verdict is WARN
    batch(tmp_path, SPOOL_BYTES)
    full = look_at_spool(tmp_path, max_rows=256)
    assert full["spool size"].verdict is FAIL


def test_a_disk_without_room_is_told_and_a_full_one_is_a_failure(
    tmp_path: Path,
) -> None:
    assert look_at_spool(tmp_path, max_spool_bytes=2**60)["spool disk"].verdict is WARN
    config = Usage(spool_dir=tmp_path)
    # Never has any.
    assert spool.space(config, Path("/proc"), 0).verdict is FAIL


def test_batches_that_nobody_takes_are_told(tmp_path: Path) -> None:
    batch(tmp_path, 4096)
    assert look_at_spool(tmp_path)["spool backlog"].verdict is OK
    later = look_at_spool(tmp_path, now=time.time() + 301, batch_interval=10.0)
    assert later["spool backlog"].verdict is WARN


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    path = batch(tmp_path, 4096, "0000000001.unreadable")
    found = look_at_spool(tmp_path)
    assert found["spool backlog"].verdict is WARN
    assert str(path) in found["spool backlog"].text


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs to look at")
def test_a_file_system_in_memory_is_told() -> None:
    found = look_at_spool(Path("/dev/shm/ogelproxy-spool"))
    assert found["spool file system"].verdict is WARN
    assert found["spool file system"].text.startswith("tmpfs")


def look_at_tls(tls: Tls, host: str = "127.0.0.1") -> Found:
    return by_subject(certificate.examine(tls, Listen(host=host), time.time))


def test_a_certificate_in_health_is_found_so(authority: Authority) -> None:
    issued = authority.issue(lifetime=90 * DAY)
    found = look_at_tls(Tls(cert=issued.cert, key=issued.key))
    assert all_ok(found)
    assert found["certificate names"].text == "localhost, 127.0.0.1"


@pytest.mark.parametrize(
    ("starts_at", "lifetime", "verdict", "words"),
    [
        (-2 * DAY, DAY, FAIL, "expired on"),
        (DAY, 90 * DAY, FAIL, "not valid before"),
        (-DAY, 6 * DAY, WARN, "4 days from now"),
    ],
)
def test_dates_of_a_certificate_are_judged(
    authority: Authority,
    starts_at: datetime.timedelta,
    lifetime: datetime.timedelta,
    verdict: Verdict,
    words: str,
) -> None:
    issued = authority.issue(starts_at=starts_at, lifetime=lifetime)
    found = look_at_tls(Tls(cert=issued.cert, key=issued.key))
    assert found["certificate dates"].verdict is verdict
    assert words in found["certificate dates"].text


def test_a_certificate_without_names_or_with_an_open_key_is_told(
    authority: Authority,
) -> None:
    issued = authority.issue(names=(), lifetime=90 * DAY)
    issued.key.chmod(0o644)
    found = look_at_tls(Tls(cert=issued.cert, key=issued.key))
    assert found["certificate names"].verdict is WARN
    assert found["private key"].verdict is WARN


def test_a_key_of_another_certificate_is_a_failure(authority: Authority) -> None:
    first, second = authority.issue(), authority.issue()
    for tls in (
        Tls(cert=first.cert, key=second.key),
        Tls(cert=first.cert.with_name("none.pem"), key=first.key),
        Tls(cert=first.cert),
    ):
        assert look_at_tls(tls)["certificate"].verdict is FAIL


def test_the_authority_of_clients_is_looked_at(authority: Authority) -> None:
    issued = authority.issue(lifetime=90 * DAY)
    found = look_at_tls(
        Tls(
            cert=issued.cert,
            key=issued.key,
            client_ca=authority.cert,
            client_certificates="allow",
        )
    )
    # The tests' own lives for a day.
    assert found["client authority dates"].verdict is WARN


def test_no_certificate_is_told_where_clients_come_from_elsewhere() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert look_at_tls(Tls(), host)["certificate"].verdict is OK
    for host in ("::", "0.0.0.0", "db.example.com"):
        assert look_at_tls(Tls(), host)["certificate"].verdict is WARN


def test_descriptors_are_compared_with_what_clients_may_take() -> None:
    listen = Listen(max_clients=1000, max_logins=500)
    for hard, verdict in (
        (resource.RLIM_INFINITY, OK),
        (2200, OK),
        (2199, WARN),
        (700, WARN),
        (699, FAIL),
    ):
        assert machine.descriptors(listen, hard).verdict is verdict


def test_a_port_is_free_or_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        finding = machine.port("listen.port", "127.0.0.1", number)
        assert finding.verdict is FAIL
        assert f"(process {os.getpid()})" in finding.text
    assert machine.port("listen.port", "127.0.0.1", number).verdict is OK
    assert machine.port("listen.port", "127.0.0.1", 0).verdict is OK


def test_an_address_of_another_machine_is_a_failure() -> None:
    finding = machine.port("admin.port", "192.0.2.1", 8080)
    assert finding.verdict is FAIL
    assert finding.advice == "correct admin.host"


def test_a_short_accept_queue_and_a_slow_clock_are_told() -> None:
    assert machine.accept_queue(Listen(backlog=1024), 128).verdict is WARN
    assert machine.accept_queue(Listen(backlog=1024), 4096).verdict is OK
    assert machine.clock_source("hpet").verdict is WARN
    assert machine.clock_source("kvm-clock").verdict is OK


async def test_all_is_examined_in_one_go(
    plane: Plane, valkey: Valkey, tmp_path: Path
) -> None:
    config = Config(
        listen=Listen(port=0),
        admin=Admin(port=0),
        control=plane.config(),
        redis=Redis(url=Secret(valkey.url)),
        usage=Usage(spool_dir=tmp_path),
    )
    found = by_subject(await doctor.examine(config))
    for subject in (
        "control plane schema",
        "redis eviction",
        "spool directory",
        "certificate",
        "listen.port",
        "admin.port",
    ):
        assert found[subject].verdict is OK


def type_doctor(*words: str, **environ: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words], env=environ)


def test_a_failure_ends_with_status_one_and_its_advice(tmp_path: Path) -> None:
    path = tmp_path / "ogelproxy.toml"
    path.write_text(f'[usage]\nspool_dir = "{tmp_path}"\n')
    result = type_doctor("--config", str(path), DATABASE_URL="", REDIS_URL="")
    assert result.exit_code == 1
    assert "→ set control.database_url (DATABASE_URL)" in result.stdout


def test_for_programs_there_is_json(tmp_path: Path, postgres: Postgres) -> None:
    made = Plane(postgres)
    asyncio.run(made.migrate())
    result = type_doctor(
        "--json",
        DATABASE_URL=postgres.dsn(made.name),
        O7S_SECRET_KEY=KEY,
        O7S_PORT="0",
        OGELPROXY_LISTEN_MAX_CLIENTS="10",
        OGELPROXY_LISTEN_MAX_LOGINS="10",
        OGELPROXY_USAGE_SPOOL_DIR=str(tmp_path),
    )
    found = orjson.loads(result.stdout)
    assert {"subject", "verdict", "text", "advice"} == set(found[0])
    assert result.exit_code == any(each["verdict"] == "fail" for each in found) == 0


def test_settings_and_a_state_directory_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "ogelproxy.toml"
    path.touch()
    result = type_doctor("--config", str(path), "--state", str(tmp_path))
    assert result.exit_code == 2
    assert "one too many" in result.stderr


def test_a_state_directory_without_a_stack_is_a_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ogelproxy", "doctor", "--state", tmp_path],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "no dev stack runs there" in result.stderr
