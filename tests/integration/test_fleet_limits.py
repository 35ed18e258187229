"""Limits over several workers, as their clients meet them."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.workers import Workers

#: More than one read of the proxy's: statements behind it are found late.
PADDING = f"/*{'x' * 400_000}*/"
STATEMENTS = 12
LONG = ";".join(f"SELECT {n} {PADDING}" for n in range(STATEMENTS))


@pytest.mark.parametrize("limiter", [LimiterMode.ENFORCE, LimiterMode.WARN])
def test_a_long_message_of_several_statements_uses_the_allowance_that_there_is(
    workers: Workers, limiter: LimiterMode
) -> None:
    tenant = workers.create_organization(tier="starter", limiter=limiter)
    for _ in range(4):
        with psycopg.connect(tenant.dsn("app"), autocommit=True) as connection:
            assert connection.execute(LONG).fetchone() == (0,)


def test_a_long_message_that_costs_more_than_there_is_runs_nothing(
    workers: Workers,
) -> None:
    tenant = workers.create_organization(tier="free")
    with psycopg.connect(tenant.dsn("app"), autocommit=True) as connection:
        connection.execute("CREATE TABLE made (n int)")
    time.sleep(1)  # until the bucket is full again
    written = LONG.replace("SELECT", "INSERT INTO made SELECT")
    with (
        psycopg.connect(tenant.dsn("app"), autocommit=True) as connection,
        pytest.raises(psycopg.OperationalError, match="query rate limit"),
    ):
        connection.execute(written)
    with psycopg.connect(tenant.dsn("app"), autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM made").fetchone() == (0,)


async def test_no_query_waits_longer_than_it_may_though_two_workers_want_the_tokens(
    workers: Workers,
) -> None:
    max_wait = 0.1
    tenant = await asyncio.to_thread(
        workers.create_organization, tier="free", max_wait=max_wait
    )
    end = time.monotonic() + 5
    waits = []

    async def queries() -> None:
        async with await psycopg.AsyncConnection.connect(
            tenant.dsn("app"), autocommit=True, prepare_threshold=None
        ) as connection:
            while (begun := time.monotonic()) < end:
                try:
                    await connection.execute("SELECT 1")
                except psycopg.errors.ConfigurationLimitExceeded:
                    await asyncio.sleep(0.02)
                waits.append(time.monotonic() - begun)

    await asyncio.gather(*(queries() for _ in range(5)))
    # The rest of it is for a busy machine.
    assert max(waits) < max_wait + 0.1
