"""Usage is exact in MongoDB: through its outages and ours, however often it is sent."""

from __future__ import annotations

import random
import signal
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually
from tests.fixtures.load import Load, billed
from tests.fixtures.mongodb import Mongo
from tests.fixtures.workers import Workers


@pytest.fixture
def organization(own_proxy: Proxy, own_mongodb: Mongo) -> Organization:
    """An organisation of a proxy whose history goes to a MongoDB of the test's own."""
    own_proxy.settings |= {
        "MONGODB_URL": own_mongodb.url,
        "OGELPROXY_USAGE_BATCH_INTERVAL": "0.2",
        "OGELPROXY_USAGE_SYNC_INTERVAL": "0.1",
    }
    own_proxy.start()
    return own_proxy.create_organization(limiter=LimiterMode.OFF)


def told(mongodb: Mongo, organization: Organization) -> int:
    """The organisation's queries in the history."""
    rows = mongodb.documents("usageHistory", handle=organization.handle)
    return sum(row["queries"] for row in rows)


def spooled(proxy: Proxy) -> list[Path]:
    """Batches in the spool, the open one included."""
    return sorted((proxy.directory / "spool").rglob("*.batch"))


def test_a_mongodb_that_is_killed_again_and_again_has_every_query_once(
    own_proxy: Proxy, own_mongodb: Mongo, organization: Organization
) -> None:
    load = Load(organization, 4)
    load.start()
    eventually(lambda: told(own_mongodb, organization) > 0)
    dice = random.Random()
    for _ in range(4):
        load.wait_under_way()
        time.sleep(dice.uniform(0.1, 0.9))
        own_mongodb.kill()
        # Long enough for batches to be closed meanwhile.
        waiting = len(spooled(own_proxy)) + 2
        eventually(lambda waiting=waiting: len(spooled(own_proxy)) >= waiting)
        own_mongodb.start()
    for _ in range(3):
        own_mongodb.freeze()
        time.sleep(dice.uniform(0.1, 0.5))
        own_mongodb.thaw()
    assert own_proxy.stop() == 0  # it delivers what it can
    load.join()
    own_proxy.start()
    eventually(lambda: len(spooled(own_proxy)) <= 1, timeout=60)
    own_proxy.stop()
    answered = sum(load.replies)
    total = told(own_mongodb, organization)
    # Of each client one query may have been answered and not read.
    assert answered <= total <= answered + len(load.replies)
    assert billed(organization)["queries"] == total


def test_a_proxy_killed_between_delivery_and_removal_sends_it_again_in_vain(
    own_proxy: Proxy, own_mongodb: Mongo, organization: Organization
) -> None:
    with organization.connect("transaction") as client:
        for _ in range(10):
            client.execute("SELECT 1")
    own_proxy.stop()
    before = own_mongodb.documents("usageHistory")
    assert told(own_mongodb, organization) == 10
    own_proxy.start()
    with organization.connect("transaction") as client:
        client.execute("SELECT 2")
        eventually(lambda: told(own_mongodb, organization) == 11)
        # It is stored once the control plane takes it too, which it can't now.
        with psycopg.connect(
            own_proxy.postgres.dsn(own_proxy.control), autocommit=True
        ) as control:
            control.execute("ALTER TABLE platform.usage_nodes RENAME TO away")
            client.execute("SELECT 3")
            eventually(lambda: told(own_mongodb, organization) == 12)
            assert billed(organization)["queries"] <= 11
            kept = [path.name for path in spooled(own_proxy)]
            own_proxy.kill()
            control.execute("ALTER TABLE platform.away RENAME TO usage_nodes")
    own_proxy.start()
    eventually(lambda: not set(kept) & {path.name for path in spooled(own_proxy)})
    own_proxy.stop()
    assert told(own_mongodb, organization) == 12
    assert billed(organization)["queries"] == 12
    ids = Counter(row["_id"] for row in own_mongodb.documents("usageHistory"))
    assert len(ids) == len(before) + 2
    assert set(ids.values()) == {1}


def test_a_killed_proxy_has_every_answered_query_in_mongodb(
    own_proxy: Proxy, own_mongodb: Mongo, organization: Organization
) -> None:
    answered, rounds = 0, 3
    for _ in range(rounds):
        load = Load(organization, 4)
        load.start()
        load.wait_under_way()
        time.sleep(random.uniform(0.05, 0.7))
        own_proxy.kill()
        load.join()
        answered += sum(load.replies)
        own_proxy.start()
    eventually(lambda: len(spooled(own_proxy)) <= 1, timeout=30)
    own_proxy.stop()
    total = told(own_mongodb, organization)
    assert answered <= total <= answered + 4 * rounds
    assert billed(organization)["queries"] == total


def test_two_workers_of_which_one_is_killed_have_every_query_in_mongodb(
    own_workers: Workers, own_mongodb: Mongo
) -> None:
    own_workers.settings |= {
        "MONGODB_URL": own_mongodb.url,
        "OGELPROXY_USAGE_BATCH_INTERVAL": "0.2",
        "OGELPROXY_USAGE_SYNC_INTERVAL": "0.1",
    }
    own_workers.start()
    organization = own_workers.create_organization(limiter=LimiterMode.OFF)
    load = Load(organization, 6)
    load.start()
    eventually(lambda: told(own_mongodb, organization) > 0)
    own_mongodb.kill()
    own_workers.wait_replaced(own_workers.signal(1, signal.SIGKILL))
    own_mongodb.start()
    own_workers.stop()
    load.join()
    own_workers.start()
    eventually(lambda: len(spooled(own_workers)) <= 2, timeout=60)
    own_workers.stop()
    answered = sum(load.replies)
    total = told(own_mongodb, organization)
    assert answered <= total <= answered + len(load.replies)
    assert billed(organization)["queries"] == total
    # The acts of the command line, too, whichever worker handed them on.
    actions = [each["action"] for each in own_mongodb.documents("auditLogs")]
    assert actions.count("organization.create") == 1
    assert actions.count("organization.set_limiter") == 1


def test_a_full_spool_loses_nothing_and_says_so(
    own_proxy: Proxy, own_mongodb: Mongo
) -> None:
    own_proxy.settings |= {
        "MONGODB_URL": own_mongodb.url,
        "OGELPROXY_USAGE_BATCH_INTERVAL": "0.05",
        "OGELPROXY_USAGE_SYNC_INTERVAL": "0.02",
        # An open batch takes 2 MB, of which a closed one keeps what it used.
        "OGELPROXY_USAGE_MAX_ROWS": "4096",
        "OGELPROXY_USAGE_MAX_SPOOL_BYTES": str(16_777_216),
    }
    own_proxy.start()
    organization = own_proxy.create_organization(limiter=LimiterMode.OFF)
    filler = own_proxy.directory / "spool" / "filler"
    sent = 0
    with organization.connect("transaction") as client:
        client.execute("SELECT 1")
        eventually(lambda: told(own_mongodb, organization) == 1)
        own_mongodb.kill()
        client.execute("SELECT 1")
        with filler.open("wb") as file:
            file.truncate(14_000_000)
        eventually(lambda: "is nearly full" in own_proxy.log.read_text())
        eventually(lambda: "max_spool_bytes" in own_proxy.log.read_text())
        for _ in range(200):
            client.execute("SELECT 1")
            sent += 1
        assert '"usage_spool":"full"' in status(own_proxy)
        filler.unlink()
        own_mongodb.start()
        client.execute("SELECT 1")
        eventually(lambda: '"usage_spool":"ok"' in status(own_proxy))
    own_proxy.stop()
    assert told(own_mongodb, organization) == sent + 3
    assert billed(organization)["queries"] == sent + 3


def status(proxy: Proxy) -> str:
    with urllib.request.urlopen(proxy.admin_url("/status"), timeout=5) as answer:
        text: str = answer.read().decode()
        return text
