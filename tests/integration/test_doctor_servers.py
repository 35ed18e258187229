"""The doctor before real servers, each in health and out of it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import redis
from psycopg import sql

from ogelproxy.config import Config, Control, Limits, Redis, Secret, Usage
from ogelproxy.doctor import control, history, meeting
from ogelproxy.doctor.finding import Verdict, compare_clock
from ogelproxy.hosts import Host, count_hosts
from ogelproxy.redis import Redis as Server
from ogelproxy.tenants.store import Store
from ogelproxy.usage.mongodb import MongoSink
from tests.fixtures.faults import eventually
from tests.fixtures.findings import KEY, Found, Plane, all_ok, by_subject
from tests.fixtures.mongodb import Mongo
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


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


async def test_a_control_plane_in_health_is_found_so(looked_at: Plane) -> None:
    found = await looked_at.examine()
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


async def test_a_pool_of_one_connection_is_examined_too(looked_at: Plane) -> None:
    config = looked_at.config().model_copy(update={"max_connections": 1})
    assert all_ok(await looked_at.examine(config))


async def test_no_url_is_one_failure(looked_at: Plane) -> None:
    found = await looked_at.examine(Control())
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
    looked_at: Plane, url: str
) -> None:
    found = await looked_at.examine(looked_at.config(url=url))
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


async def test_a_missing_migration_is_told(looked_at: Plane) -> None:
    await looked_at.sql(
        "DELETE FROM platform.migrations WHERE name = "
        "(SELECT max(name) FROM platform.migrations)"
    )
    found = await looked_at.examine()
    assert found["control plane schema"].text == "1 migrations are missing"
    assert found["control plane schema"].verdict is WARN


async def test_a_schema_of_a_newer_release_is_told(looked_at: Plane) -> None:
    await looked_at.sql("INSERT INTO platform.migrations VALUES ('9999_future.sql')")
    found = await looked_at.examine()
    assert found["control plane schema"].verdict is WARN
    assert "9999_future.sql" in found["control plane schema"].text


async def test_a_read_only_control_plane_is_a_failure(looked_at: Plane) -> None:
    await looked_at.sql(
        sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(
            sql.Identifier(looked_at.name)
        )
    )
    found = await looked_at.examine()
    assert found["control plane writes"].verdict is FAIL


async def test_versions_and_connections_are_judged_by_their_numbers(
    looked_at: Plane,
) -> None:
    async with Store(looked_at.config(), None) as store:
        vitals = await store.fetch_vitals()
    for major, verdict in ((12, FAIL), (13, WARN), (14, WARN), (15, OK), (18, OK)):
        other = dataclasses.replace(vitals, version=f"{major}.1", major=major)
        assert control.version(other).verdict is verdict
    full = dataclasses.replace(vitals, used_connections=vitals.max_connections - 4)
    for count, workers, verdict in ((4, 1, WARN), (3, 1, OK), (1, 2, OK), (1, 3, WARN)):
        config = Control(max_connections=count)
        assert control.connections(full, config, workers).verdict is verdict


async def test_notifications_that_do_not_arrive_are_a_failure(
    looked_at: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ogelproxy.tenants.vitals.NOTIFY_TIMEOUT", 0.2)
    between = Between(looked_at.postgres.host, looked_at.postgres.port)
    between.dropped = b"A"  # NotificationResponse
    url = urlsplit(looked_at.postgres.dsn(looked_at.name))
    async with between.running():
        login = url.netloc.rpartition("@")[0]
        through = url._replace(
            netloc=f"{login}@127.0.0.1:{between.port}", query="sslmode=disable"
        )
        found = await looked_at.examine(looked_at.config(url=through.geturl()))
    assert found["control plane NOTIFY"].verdict is FAIL
    assert found["control plane schema"].verdict is OK


@pytest.mark.parametrize("key", [None, "short", "another passphrase of operators"])
async def test_a_key_that_does_not_decrypt_is_a_failure(
    looked_at: Plane, key: str | None
) -> None:
    found = await looked_at.examine(looked_at.config(key=key))
    assert found["secret key"].verdict is FAIL
    if key and len(key) > 16:
        assert found["secret key"].text.endswith("strings: org_a/app")
    assert str(key) not in found["secret key"].text.replace("org_a", "")


async def test_an_old_key_behind_a_new_one_decrypts(looked_at: Plane) -> None:
    key = f"another passphrase of operators,{KEY}"
    found = await looked_at.examine(looked_at.config(key=key))
    assert found["secret key"].verdict is OK


@pytest.mark.parametrize(("hours", "word"), [(1, "behind"), (-1, "ahead of")])
async def test_clocks_apart_are_told_with_their_direction(
    looked_at: Plane, valkey: Valkey, hours: int, word: str
) -> None:
    def now() -> float:
        return time.time() + hours * 3600

    found = await looked_at.examine(now=now) | await look(valkey.url, now=now)
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
    config = Config(redis=Redis(url=Secret(url), timeout=limit))
    return by_subject([each async for each in meeting.examine(config, now)])


async def test_a_valkey_in_health_is_found_so(own_valkey: Valkey) -> None:
    # The session's has numbers of many hosts of other tests.
    found = await look(own_valkey.url)
    # It may be slow while another test runs on the machine.
    found.pop("redis round trip")
    assert all_ok(found)
    with redis.Redis.from_url(own_valkey.url) as client:
        known = client.info("server")
    version = known.get("valkey_version", known["redis_version"])
    assert found["redis version"].text.endswith(f" {version}")


async def test_without_a_redis_one_process_is_well_and_several_are_not() -> None:
    for workers, verdict in ((1, OK), (2, FAIL)):
        examined = meeting.examine(Config(workers=workers), time.time)
        found = by_subject([each async for each in examined])
        assert found["redis"].verdict is verdict


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
    primary, replica = valkeys(repl_diskless_sync_delay="0"), valkeys()
    with redis.Redis.from_url(replica.url) as client:
        client.config_set("masterauth", urlsplit(primary.url).password or "")
        client.replicaof("127.0.0.1", str(primary.port))
    with redis.Redis.from_url(primary.url) as client:
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


async def test_as_many_processes_as_share_the_floor_are_told(
    own_valkey: Valkey,
) -> None:
    client = Server(Redis(url=Secret(own_valkey.url), timeout=5.0))
    hosts = [Host(client, 2, time.monotonic, lambda: None) for _ in range(2)]
    counted = []
    for host in hosts:
        await host.start()
        counted.append(await count_hosts(client))
    assert counted == [1, 2]
    for host in hosts:
        await host.stop()
    await client.stop()
    for most, floor, verdict in ((3, 0.1, OK), (2, 0.1, WARN), (2, 0.0, OK)):
        limits = Limits(max_hosts=most, floor=floor)
        assert meeting.hosts(2, limits).verdict is verdict
    assert "2 processes" in (await look(own_valkey.url))["redis hosts"].text


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


async def look_at_history(
    url: str, now: Callable[[], float] = time.time, days: int = 30
) -> Found:
    config = Usage(mongodb_url=Secret(url), history_days=days)
    return by_subject([each async for each in history.examine(config, now)])


async def test_a_mongodb_in_health_is_found_so(mongodb: Mongo) -> None:
    found = await look_at_history(mongodb.url)
    assert found["mongodb indexes"].verdict is WARN
    assert "usageHistory.org_time, usageHistory.expiry" in found["mongodb indexes"].text
    sink = MongoSink(Secret(mongodb.url), 30)
    await sink.record([])  # makes the indexes
    sink.close()
    found = await look_at_history(mongodb.url)
    assert all_ok(found)
    assert list(found) == [
        "mongodb version",
        "mongodb role",
        "mongodb indexes",
        "mongodb clock",
    ]


async def test_an_expiry_of_other_settings_is_told(mongodb: Mongo) -> None:
    sink = MongoSink(Secret(mongodb.url), 30)
    await sink.record([])
    sink.close()
    found = await look_at_history(mongodb.url, days=31)
    assert found["mongodb indexes"].verdict is WARN
    assert "org_time" not in found["mongodb indexes"].text


async def test_the_clock_of_mongodb_is_compared(mongodb: Mongo) -> None:
    found = await look_at_history(mongodb.url, now=lambda: time.time() - 60)
    assert found["mongodb clock"].verdict is WARN


async def test_kinds_of_mongodb_are_judged_by_what_they_keep(mongodb: Mongo) -> None:
    sink = MongoSink(Secret(mongodb.url), 30)
    vitals = await sink.fetch_vitals()
    sink.close()
    for change, verdict in (
        ({"replica_set": ""}, WARN),
        ({"replica_set": "", "is_sharded": True}, OK),
        ({"is_writable": False}, FAIL),
    ):
        assert history.role(dataclasses.replace(vitals, **change)).verdict is verdict
    old = dataclasses.replace(vitals, version="6.0.20")
    assert history.version(old).verdict is WARN


@pytest.mark.parametrize(
    "url", ["mongodb://user:hunter22@127.0.0.1:1/none", "http://hunter22"]
)
async def test_an_unreachable_mongodb_is_one_failure_without_its_password(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr("ogelproxy.usage.mongodb.SELECTION_TIMEOUT_MS", 200)
    monkeypatch.setattr("ogelproxy.usage.mongodb.OPERATION_TIMEOUT_MS", 400)
    found = await look_at_history(url)
    assert list(found) == ["mongodb"]
    assert found["mongodb"].verdict is FAIL
    assert "hunter22" not in str(found)


async def test_without_a_mongodb_there_is_nothing_to_mend() -> None:
    examined = history.examine(Usage(), time.time)
    assert all_ok(by_subject([each async for each in examined]))
