"""The way to Redis: scripts that it forgot, channels, and a server that is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

import pytest

from ogelproxy.config import Redis as RedisConfig
from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, RedisUnavailable
from ogelproxy.redis import SILENCE_TIMEOUT, Redis, Script
from tests.fixtures.redis import Valkey

ECHO = Script("return {KEYS[1], ARGV[1]}")


@pytest.fixture
async def link(own_valkey: Valkey) -> AsyncIterator[Redis]:
    made = Redis(RedisConfig(url=Secret(own_valkey.url), timeout=0.3))
    yield made
    await made.stop()


async def test_scripts_run_in_one_pipeline_in_order(link: Redis) -> None:
    await link.start()
    answers = await link.run(ECHO, [([f"k{n}"], [n]) for n in range(100)])
    assert answers == [[b"k%d" % n, b"%d" % n] for n in range(100)]


async def test_a_script_that_was_forgotten_is_sent_again(link: Redis) -> None:
    await link.start()
    await link.run(ECHO, [(["a"], [1])])
    await link.command("SCRIPT", "FLUSH")
    assert await link.run(ECHO, [(["b"], [2]), (["c"], [3])]) == [
        [b"b", b"2"],
        [b"c", b"3"],
    ]


async def test_what_is_refused_does_not_look_like_away(link: Redis) -> None:
    await link.start()
    with pytest.raises(RedisUnavailable, match="unknown command"):
        await link.command("NONSENSE")
    assert link.is_up


async def test_a_frozen_server_is_away_until_it_answers(
    link: Redis, own_valkey: Valkey
) -> None:
    await link.start()
    assert link.is_up
    own_valkey.freeze()
    with pytest.raises(RedisUnavailable):
        await link.command("PING")
    assert not link.is_up
    own_valkey.thaw()
    assert await link.command("PING")
    assert link.is_up


async def test_several_channels_are_heard_for_longer_than_they_are_quiet(
    link: Redis,
) -> None:
    said: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
    heard: list[bool] = []
    for channel in ("one", "two", "three"):
        link.hear(channel, lambda data, name=channel: said.put_nowait((name, data)))  # type: ignore[misc]
    link.on_heard.append(heard.append)
    await link.start()
    # Quiet for so long that the connection was asked, and answered, twice.
    await asyncio.sleep(2.5 * SILENCE_TIMEOUT)
    await link.say("two", b"hello")
    assert await asyncio.wait_for(said.get(), 5) == ("two", b"hello")
    assert heard == [True]


async def test_channels_are_heard_again_after_a_restart(
    link: Redis, own_valkey: Valkey
) -> None:
    said: asyncio.Queue[bytes] = asyncio.Queue()
    states: asyncio.Queue[bool] = asyncio.Queue()
    link.hear("news", said.put_nowait)
    link.on_heard.append(states.put_nowait)
    await link.start()
    assert await asyncio.wait_for(states.get(), 5)
    own_valkey.kill()
    assert not await asyncio.wait_for(states.get(), 5)
    await asyncio.to_thread(own_valkey.start)
    while not await asyncio.wait_for(states.get(), 5):
        pass
    await link.say("news", b"again")
    assert await asyncio.wait_for(said.get(), 5) == b"again"


async def test_a_url_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match=r"redis\.url"):
        Redis(RedisConfig(url=Secret("http://example.com")))
    with pytest.raises(ConfigInvalid, match=r"redis\.url"):
        Redis(RedisConfig())


async def test_who_is_cancelled_while_it_asks_ends_wherever_that_was(
    valkey: Valkey,
) -> None:
    redis = Redis(RedisConfig(url=Secret(valkey.url)))
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


async def test_several_channels_are_heard_from_when_it_is_told(link: Redis) -> None:
    channels = ["one", "two", "three"]
    said: asyncio.Queue[bytes] = asyncio.Queue()
    told: asyncio.Queue[bool] = asyncio.Queue()
    for channel in channels:
        link.hear(channel, said.put_nowait)
    link.on_heard.append(told.put_nowait)
    await link.start()
    async with asyncio.timeout(5):
        assert await told.get()
        for channel in channels:
            await link.say(channel, channel.encode())
            assert await said.get() == channel.encode()
