"""What is let in on an old record in Redis does not stay in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import LiteralString

import psycopg
import pytest

from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import samples
from tests.fixtures.redis import Valkey

#: Seconds in which a change takes effect (spec, layer 1).
PROMPT = 1.0
COUNT = 12


def stays(organization: Organization) -> bool:
    """Whether a client can get in and is there still when changes have arrived."""
    with contextlib.suppress(psycopg.OperationalError):
        with organization.connect() as connection:
            end = time.monotonic() + PROMPT
            while time.monotonic() < end:
                connection.execute("SELECT 1")
            return True
    return False


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE platform.api_keys SET revoked_at = now()",
        "UPDATE platform.organizations SET status = 'suspended'",
        "DELETE FROM platform.organizations",
    ],
    ids=["revoked", "suspended", "deleted"],
)
def test_nobody_stays_on_a_record_that_is_no_longer_true(
    own_proxy: Proxy, own_valkey: Valkey, change: LiteralString
) -> None:
    own_proxy.settings["REDIS_URL"] = own_valkey.url
    own_proxy.start()
    organizations: Sequence[Organization] = [
        own_proxy.create_organization() for _ in range(COUNT)
    ]
    for each in organizations:
        with each.connect() as connection:
            connection.execute("SELECT 1")
    own_proxy.stop()
    own_proxy.postgres.execute(change, dbname=own_proxy.control)
    own_proxy.start()
    assert [each.handle for each in organizations if stays(each)] == []
    # All of them were found in Redis first, as they had been.
    assert samples(own_proxy)['o7s_tenant_lookups_total{from="redis"}'] >= COUNT
