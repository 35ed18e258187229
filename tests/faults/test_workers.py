"""Workers and their supervisor are killed and frozen under load."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization
from tests.fixtures.faults import eventually, samples
from tests.fixtures.load import Load, at_least, billed
from tests.fixtures.workers import Comers, Workers, is_running

#: Connections that ask without a pause while something goes wrong.
CLIENTS = 6


@pytest.fixture
def tenant(own_workers: Workers) -> Organization:
    """An organisation of two workers that close a batch every 0.3 s."""
    own_workers.settings["OGELPROXY_USAGE_BATCH_INTERVAL"] = "0.3"
    own_workers.settings["OGELPROXY_USAGE_SYNC_INTERVAL"] = "0.1"
    own_workers.start()
    return own_workers.create_organization(limiter=LimiterMode.OFF)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_killed_worker_is_replaced_and_the_others_clients_see_nothing(
    own_workers: Workers, tenant: Organization
) -> None:
    load = Load(tenant, CLIENTS)
    load.start()
    load.wait_under_way()
    with own_workers.client(tenant, 2) as beside, Comers(tenant) as comers:
        comers.wait_served(20)
        before = samples(own_workers)
        killed = own_workers.signal(1, signal.SIGKILL)
        for _ in range(20):
            assert beside.query("SELECT 1")[-1] == (b"Z", b"I")
        after = own_workers.wait_replaced(killed)
        assert after[1] != killed
        comers.wait_served(20)
        told = samples(own_workers)
    # Nobody was turned away: those that the dead one had accepted were cut off.
    assert comers.ends["refused"] == 0, comers.errors
    assert comers.ends["cut"] + comers.ends["parted"] <= 4, comers.errors
    assert told["o7s_worker_restarts_total"] == 1
    for name in before:
        if "_total" in name or name.startswith("o7s_latency_seconds_"):
            assert told[name] >= before[name], name
    own_workers.stop()
    load.join()
    # A query that was under way when its worker died may have been counted.
    answered = sum(load.replies) + comers.ends["served"] + 20
    assert 0 <= billed(tenant)["queries"] - answered <= CLIENTS + 4
    assert not list((own_workers.directory / "spool").rglob("*.batch"))


def test_a_worker_that_dies_again_and_again_is_replaced_ever_more_slowly(
    own_workers: Workers, tenant: Organization
) -> None:
    for _ in range(3):
        own_workers.wait_replaced(own_workers.signal(1, signal.SIGKILL))
    log = own_workers.log.read_text()
    pauses = [
        line.split(" in ")[1] for line in log.splitlines() if "is replaced" in line
    ]
    assert [pause.split()[0] for pause in pauses] == ["0.1", "0.2", "0.4"]
    assert samples(own_workers)["o7s_worker_restarts_total"] == 3
    with own_workers.client(tenant, 1) as client:
        assert client.query("SELECT 1")[-1] == (b"Z", b"I")


def test_a_frozen_worker_holds_up_its_own_clients_only(
    own_workers: Workers, tenant: Organization
) -> None:
    pid = own_workers.pids()[1]
    with own_workers.client(tenant, 1) as held, own_workers.client(tenant, 2) as free:
        held.query("SELECT 1")
        total = 'o7s_requests_total{database_type="postgres",tier="enterprise"}'
        before = samples(own_workers)
        with frozen(pid):
            began = time.monotonic()
            held.send(b"Q\0\0\0\x0dSELECT 1\0")
            for _ in range(50):
                assert free.query("SELECT 1")[-1] == (b"Z", b"I")
            during = samples(own_workers)
            worker = own_workers.status()["workers"][0]
            assert time.monotonic() - began < 5
        assert held.until(b"Z")[-1] == (b"Z", b"I")
    # It is left out of what is told, but for what it had counted before.
    assert during[total] == before[total] + 50
    assert during["o7s_clients"] == before["o7s_clients"] - 1
    assert during["o7s_worker_silences_total"] > before["o7s_worker_silences_total"]
    assert "no answer" in worker["error"]
    assert own_workers.pids()[1] == pid
    own_workers.stop()
    assert billed(tenant)["queries"] == 52


def test_a_worker_that_is_frozen_for_five_seconds_loses_nothing(
    own_workers: Workers, tenant: Organization
) -> None:
    load = Load(tenant, CLIENTS)
    load.start()
    load.wait_under_way()
    with Comers(tenant, 2) as comers:
        with frozen(own_workers.pids()[2]):
            time.sleep(5)
        comers.wait_served(20)
    before = list(load.replies)
    eventually(lambda: all(a > b for a, b in zip(load.replies, before, strict=True)))
    assert set(comers.ends) == {"served"}, comers.errors
    own_workers.stop()
    load.join()
    answered = sum(load.replies) + comers.ends["served"]
    assert 0 <= billed(tenant)["queries"] - answered <= CLIENTS


def test_workers_end_when_their_supervisor_was_killed_and_usage_stays_exact(
    own_workers: Workers, tenant: Organization
) -> None:
    answered = 0
    for _ in range(2):
        load = Load(tenant, CLIENTS)
        load.start()
        load.wait_under_way()
        pids = own_workers.pids().values()
        own_workers.kill()
        own_workers.start()
        load.join()
        answered += sum(load.replies)
        eventually(lambda: not any(map(is_running, pids)))  # noqa: B023
    eventually(at_least(tenant, answered), timeout=20)
    own_workers.stop()
    assert 0 <= billed(tenant)["queries"] - answered <= 2 * CLIENTS
    assert not list((own_workers.directory / "spool").rglob("*.batch"))


def test_a_transaction_outlives_a_killed_supervisor_no_longer_than_its_slot(
    own_workers: Workers,
) -> None:
    own_workers.settings["OGELPROXY_DRAIN_TIMEOUT"] = "60"
    own_workers.start()
    tenant = own_workers.create_organization(limiter=LimiterMode.OFF)
    pids = own_workers.pids().values()
    with own_workers.client(tenant, 1) as client:
        client.query("BEGIN")
        own_workers.kill()
        killed_at = time.monotonic()
        time.sleep(1)
        assert client.query("SELECT 1")[-1] == (b"Z", b"T")
        assert client.refusal()["C"] == "57P01"
        # Redis counts its slot for 8.8 s from its last renewal.
        assert 5 < time.monotonic() - killed_at < 8
    eventually(lambda: not any(map(is_running, pids)))


def test_everything_killed_at_once_loses_no_query(
    own_workers: Workers, tenant: Organization
) -> None:
    load = Load(tenant, CLIENTS)
    load.start()
    load.wait_under_way()
    for pid in own_workers.pids().values():
        os.kill(pid, signal.SIGSTOP)
    pids = list(own_workers.status()["workers"])
    own_workers.kill()
    for worker in pids:
        os.kill(worker["pid"], signal.SIGKILL)
    load.join()
    answered = sum(load.replies)
    own_workers.start()
    eventually(at_least(tenant, answered), timeout=20)
    own_workers.stop()
    assert 0 <= billed(tenant)["queries"] - answered <= CLIENTS
