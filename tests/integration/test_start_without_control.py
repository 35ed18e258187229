"""A proxy that starts while its control plane is away, on what Redis knows."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually, samples
from tests.fixtures.link import Link
from tests.fixtures.postgres import Postgres
from tests.fixtures.redis import Valkey


@pytest.fixture
def link(postgres: Postgres) -> Iterator[Link]:
    """The proxy's way to its control plane."""
    with Link((postgres.host, postgres.port)) as link:
        yield link


@pytest.fixture
def known(own_proxy: Proxy, own_valkey: Valkey, link: Link) -> Organization:
    """An organisation that has been served; the proxy ended since."""
    url = own_proxy.postgres.dsn(own_proxy.control)
    port = f":{own_proxy.postgres.port}/"
    assert port in url
    own_proxy.settings["DATABASE_URL"] = url.replace(port, f":{link.port}/")
    own_proxy.settings["REDIS_URL"] = own_valkey.url
    own_proxy.start()
    organization = own_proxy.create_organization()
    with organization.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    eventually(lambda: status(own_proxy)["control_plane"] == "up")
    own_proxy.stop()
    return organization


def status(proxy: Proxy) -> dict[str, object]:
    with urllib.request.urlopen(proxy.admin_url("/status"), timeout=5) as answer:
        told: dict[str, object] = json.load(answer)
    return told


def test_it_serves_whom_redis_knows_and_says_so(
    own_proxy: Proxy, known: Organization, link: Link
) -> None:
    link.cut()
    own_proxy.start()
    with known.connect() as connection:
        assert connection.execute("SELECT 2").fetchone() == (2,)
        told = status(own_proxy)
        assert told["control_plane"] == "degraded"
        assert isinstance(told["control_plane_stale_seconds"], float)
        during = samples(own_proxy)
        assert during["o7s_control_up"] == 0
        assert during["o7s_tenants_unproven"] == 1
        assert during['o7s_tenant_lookups_total{from="redis"}'] >= 1
        assert own_proxy.refusal("org_nobody", "key")["C"] == "57P03"
        link.mend()
        eventually(lambda: samples(own_proxy)["o7s_control_up"] == 1)
        assert samples(own_proxy)["o7s_tenants_unproven"] == 0
        assert status(own_proxy)["control_plane_stale_seconds"] == 0
        # What is asked of the control plane itself works again too.
        assert own_proxy.refusal("org_nobody", "key")["C"] == "28P01"
        assert connection.execute("SELECT 3").fetchone() == (3,)
    assert "starting with what Redis knows" in own_proxy.log.read_text()


def test_without_redis_either_it_says_what_is_missing(
    own_proxy: Proxy, known: Organization, own_valkey: Valkey, link: Link
) -> None:
    link.cut()
    own_valkey.stop()
    ended = subprocess.run(
        [sys.executable, "-m", "ogelproxy", "serve"],
        env=own_proxy.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode != 0
    assert "the control plane gives no answer" in ended.stderr
    assert "Traceback" not in ended.stderr
