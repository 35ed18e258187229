"""Hosts: which processes share a Redis, and the number that each of them has.

A host is a process that leases tokens. Those with the lowest numbers may mint a
part of every limit without asking, so that not all stands still when Redis is away.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable

from ogelproxy import keys
from ogelproxy.errors import RedisUnavailable
from ogelproxy.redis import Redis, Script

logger = logging.getLogger(__name__)

REGISTER = Script.read("epoch.lua", "hosts.lua")

#: Seconds that a number is kept without being renewed: how long Redis may be away
#: until nothing is minted any more. Redis counts a tenth longer.
NUMBER_TTL = 600.0
#: Seconds that a number stays taken when its host has stopped: by then every bucket
#: has forgotten what the host minted.
RELEASED_TTL = 60.0
RENEW_INTERVAL = 20.0
RETRY_INTERVAL = 1.0
#: Seconds until a number that was just given is used: by then no lease is left that
#: was granted without knowing of it.
SETTLE_INTERVAL = 3.0


async def count_hosts(redis: Redis) -> int:
    """Return how many numbers are taken. Raises RedisUnavailable."""
    seconds, microseconds = await redis.command("TIME")
    now = int(seconds) * 1_000_000 + int(microseconds)
    known = await redis.command("HGETALL", keys.HOSTS)
    return sum(
        int(taken.split()[1]) > now
        for number, taken in known.items()
        if number.isdigit()
    )


class Host:
    """This process among those that share a Redis; start before use, stop at the end.

    `renewed` is called whenever `number`, `since` or `until` changed.
    """

    def __init__(
        self,
        redis: Redis,
        max_hosts: int,
        clock: Callable[[], float],
        renewed: Callable[[], None],
    ) -> None:
        #: Never the same again, so that nobody is taken for a process that died.
        self.name = secrets.token_hex(8)
        #: Of those that share the floor; None while it has none.
        self.number: int | None = None
        #: When the number may be used, by the clock; void while there is none.
        self.since = math.inf
        self.until = -math.inf
        self._redis = redis
        self._max_hosts = max_hosts
        self._clock = clock
        self._renewed = renewed
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask for a number; that Redis doesn't answer is no error."""
        await self._try_renew()
        self._keeping = asyncio.create_task(self._keep(), name="host")

    async def stop(self) -> None:
        """Let go of the number, if Redis answers."""
        if self._keeping is None:
            return
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        self._keeping = None
        if self.number is not None:
            try:
                await self._register(RELEASED_TTL)
            except RedisUnavailable as error:
                logger.info("the number of this host stays taken: %s", error)

    async def _keep(self) -> None:
        while True:
            is_sure = self._redis.is_up and self.number is not None
            await asyncio.sleep(RENEW_INTERVAL if is_sure else RETRY_INTERVAL)
            await self._try_renew()

    async def _try_renew(self) -> None:
        asked_at = self._clock()
        try:
            number = await self._register(NUMBER_TTL)
        except RedisUnavailable:
            return
        if number < 0:
            number_or_none, self.until = None, -math.inf
        else:
            number_or_none, self.until = number, asked_at + NUMBER_TTL
        if number_or_none != self.number:
            self.number = number_or_none
            self.since = self._clock() + SETTLE_INTERVAL
        self._renewed()

    async def _register(self, seconds: float) -> int:
        had = -1 if self.number is None else self.number
        if had >= 0 and self._clock() >= self.until:
            had = -1  # somebody else may have been given it
        arguments = (
            self.name,
            had,
            self._max_hosts,
            round(seconds * 1e6),
            round(NUMBER_TTL * 1e6),
        )
        [number] = await self._redis.run(
            REGISTER, [((keys.HOSTS, keys.EPOCH), arguments)]
        )
        return int(number)
