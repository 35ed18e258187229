"""The doctor before files, ports and limits; all of it in one go; its command."""

from __future__ import annotations

import asyncio
import datetime
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

from ogelproxy import doctor
from ogelproxy.cli import main
from ogelproxy.config import Admin, Config, Listen, Redis, Secret, Tls, Usage
from ogelproxy.doctor import certificate, machine, spool
from ogelproxy.doctor.finding import Verdict
from tests.fixtures.certificates import Authority
from tests.fixtures.findings import KEY, Found, Plane, all_ok, by_subject
from tests.fixtures.mongodb import Mongo
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey

DAY = datetime.timedelta(days=1)
SPOOL_BYTES = 16 * 1024 * 1024
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


def look_at_spool(
    directory: Path, now: float | None = None, **settings: float
) -> Found:
    config = Usage(
        **{"spool_dir": directory, "max_spool_bytes": SPOOL_BYTES, **settings}
    )
    return by_subject(spool.examine(config, 1, lambda: now or time.time()))


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


def test_each_process_has_a_directory_with_as_much_room(tmp_path: Path) -> None:
    for worker in ("worker-1", "worker-2"):
        (tmp_path / worker).mkdir()
        (tmp_path / worker / "0000000001.batch").touch()
        os.truncate(tmp_path / worker / "0000000001.batch", SPOOL_BYTES * 6 // 10)
    assert look_at_spool(tmp_path, max_rows=256)["spool size"].verdict is OK


def test_a_disk_without_room_is_told_and_a_full_one_is_a_failure(
    tmp_path: Path,
) -> None:
    assert look_at_spool(tmp_path, max_spool_bytes=2**60)["spool disk"].verdict is WARN
    config = Usage(spool_dir=tmp_path)
    # Never has any.
    assert spool.space(config, Path("/proc"), 1).verdict is FAIL


def test_batches_that_nobody_takes_are_told(tmp_path: Path) -> None:
    batch(tmp_path, 4096)
    assert look_at_spool(tmp_path)["spool backlog"].verdict is OK
    later = look_at_spool(tmp_path, now=time.time() + 301, batch_interval=10.0)
    assert later["spool backlog"].verdict is WARN


def test_events_that_nobody_takes_are_told_before_the_audit_is_lost(
    tmp_path: Path,
) -> None:
    (tmp_path / "events").mkdir()
    path = tmp_path / "events" / "0.events"
    path.touch()
    for mebibytes, verdict in ((1, OK), (32, WARN), (64, FAIL)):
        os.truncate(path, mebibytes * 1024 * 1024)
        assert look_at_spool(tmp_path)["spool events"].verdict is verdict


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
    looked_at: Plane, valkey: Valkey, mongodb: Mongo, tmp_path: Path
) -> None:
    config = Config(
        listen=Listen(port=0),
        admin=Admin(port=0),
        control=looked_at.config(),
        redis=Redis(url=Secret(valkey.url)),
        usage=Usage(spool_dir=tmp_path, mongodb_url=Secret(mongodb.url)),
    )
    found = by_subject(await doctor.examine(config))
    for subject in (
        "control plane schema",
        "redis eviction",
        "mongodb role",
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
