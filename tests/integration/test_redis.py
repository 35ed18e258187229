"""Our one way to Redis, on a real Valkey."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from ogelproxy.config import Redis as Settings
from ogelproxy.config import Secret
from ogelproxy.redis import Redis, Script
from tests.fixtures.redis import Valkey


async def test_who_is_cancelled_while_it_asks_ends_wherever_that_was(
    valkey: Valkey,
) -> None:
    redis = Redis(Settings(url=Secret(valkey.url)))
    await redis.start()
    script = Script("return 1")

    async def ask() -> NoReturn:
        while True:
            await redis.run(script, [(("key",), ())])

    for turns in range(120):
        asking = asyncio.create_task(ask())
        for _ in range(turns % 40):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking], timeout=5)
        assert asking.cancelled()
    await redis.stop()
