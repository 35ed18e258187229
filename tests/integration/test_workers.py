"""Several workers behind one port: who serves, what they tell, how they change."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey


@pytest.fixture(scope="module")
def workers(
    postgres: Postgres, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    proxy = Proxy(postgres, tmp_path_factory.mktemp("workers"))
    proxy.arguments = ["--workers", "2"]
    proxy.settings["REDIS_URL"] = valkey.url
    proxy.start()
    yield proxy
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.log.read_text()


@pytest.fixture(scope="module")
def tenant(workers: Proxy) -> Organization:
    return workers.create_organization(limiter=LimiterMode.OFF)


def status(proxy: Proxy) -> Any:
    with urllib.request.urlopen(proxy.admin_url("/status"), timeout=5) as answer:
        return json.load(answer)


def test_both_workers_get_connections(workers: Proxy, tenant: Organization) -> None:
    clients = [tenant.connect("transaction") for _ in range(24)]
    told = status(workers)
    counts = [worker["status"]["clients"] for worker in told["workers"]]
    assert sum(counts) == told["clients"] == 24
    assert all(counts), counts
    for client in clients:
        assert client.execute("SELECT 1").fetchone() == (1,)
        client.close()
