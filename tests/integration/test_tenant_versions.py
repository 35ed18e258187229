"""No order of changes, messages, reads and writes brings an old record back.

Processes share one real Valkey and a control plane in memory. What each of them
reads, writes and hears comes late, and when is drawn from a seed.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any
from uuid import uuid4

import pytest

from ogelproxy import keys
from ogelproxy.config import Control, Secret
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.redis import Call, Hearer, Redis, Script
from ogelproxy.tenants.cache import TenantCache
from ogelproxy.tenants.directory import Directory
from ogelproxy.tenants.model import Tenant, Tier
from ogelproxy.tenants.seal import unseal
from ogelproxy.tenants.vault import Vault
from tests.fixtures.fleet import until
from tests.fixtures.redis import Valkey

FREE = Tier("free", 5, 10, 1, False, 0, 5, 10, None, None, 1)
STEPS = 120


class World:
    """The control plane: what is true now, and what was."""

    def __init__(self, handle: str) -> None:
        self.handle = handle
        self.version = 0
        self.record: Tenant | None = None
        #: The latest versions of those that were deleted.
        self.deleted: list[int] = []

    def change(self) -> None:
        self.version += 1
        id = uuid4() if self.record is None else self.record.id
        self.record = Tenant(
            id, self.handle, self.handle, FREE, False, self.version, b"salt"
        )

    def delete(self) -> None:
        if self.record is not None:
            self.deleted.append(self.record.version)
            self.record = None


class LateStore:
    """The control plane as one process sees it: answers wait for the gate."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.gate = asyncio.Event()
        self.changed: Callable[[str], None] = lambda payload: None

    async def fetch_tenants(self, handles: Collection[str]) -> dict[str, Tenant]:
        record = self.world.record
        await self.gate.wait()
        return {} if record is None else {record.handle: record}

    async def fetch_versions(self, handles: Collection[str]) -> dict[str, int]:
        record = self.world.record
        await self.gate.wait()
        return {} if record is None else {record.handle: record.version}

    async def listen(
        self, changed: Callable[[str], None], attached: Callable[[bool], None]
    ) -> None:
        self.changed = changed
        attached(True)
        await asyncio.Event().wait()


class LateRedis(Redis):
    """Answers come late, writes go late, and messages wait to be handed over."""

    def __init__(self, config: RedisConfig) -> None:
        super().__init__(config)
        self.gate = asyncio.Event()
        self.gate.set()
        self.messages: deque[bytes] = deque()
        self.hearer: Hearer = lambda message: None
        self.is_late = True
        self.is_heard = asyncio.Event()
        self.on_heard.append(lambda is_heard: self.is_heard.set())

    async def command(self, *words: str | int | float | bytes) -> Any:
        answer = await super().command(*words)
        await self.gate.wait()
        return answer

    async def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        await self.gate.wait()
        return await super().run(script, calls)

    def hear(self, channel: str, hearer: Hearer) -> None:
        self.hearer = hearer
        super().hear(channel, self._keep)

    def _keep(self, message: bytes) -> None:
        self.messages.append(message)
        if not self.is_late:
            self.hand_over()

    def hand_over(self) -> None:
        while self.messages:
            self.hearer(self.messages.popleft())


class Process:
    """A directory, and what its subscribers were told."""

    def __init__(self, world: World, url: str, vault: Vault, *, is_deaf: bool) -> None:
        self.world = world
        self.is_deaf = is_deaf  # to the control plane: has Redis only
        self.store = LateStore(world)
        self.redis = LateRedis(RedisConfig(url=Secret(url)))
        # Nothing is found by comparing: it has to be told.
        control = Control(reconcile_interval=3600, negative_ttl=0)
        self.directory = Directory(
            self.store, control, cache=TenantCache(self.redis, vault)
        )
        self.directory.hold(world.handle)
        self.directory.subscribe(self._told)
        self.latest = 0  # the newest version that it ever knew
        self.wrong: list[str] = []  # what should not have happened
        self.finds: list[asyncio.Task[Tenant | None]] = []

    def _told(self, old: Tenant, new: Tenant | None) -> None:
        if new is None:
            if not any(version >= old.version for version in self.world.deleted):
                self.wrong.append(f"{old.version} was not deleted")
        elif new.version <= old.version:
            self.wrong.append(f"{new.version} after {old.version}")
        self.look()

    def look(self) -> None:
        """What it knows is never older than what it knew."""
        record = self.directory.peek(self.world.handle)
        if record is not None:
            if record.version < self.latest:
                self.wrong.append(f"{record.version} after {self.latest}")
            self.latest = record.version

    def find(self) -> None:
        self.finds.append(asyncio.create_task(self.directory.find(self.world.handle)))

    def notify(self) -> None:
        if not self.is_deaf:
            self.store.changed(f"org:{self.world.handle}")

    @property
    def version(self) -> int | None:
        record = self.directory.peek(self.world.handle)
        return None if record is None else record.version


@pytest.mark.parametrize("seed", range(24))
async def test_what_is_newest_stays_whatever_comes_late(
    valkey: Valkey, seed: int
) -> None:
    chance = random.Random(seed)
    world = World(f"org_{uuid4().hex[:12]}")
    vault = Vault(Secret("a passphrase of this test"))
    processes = [
        Process(world, valkey.url, vault, is_deaf=number == 2) for number in range(3)
    ]
    world.change()
    for each in processes:
        each.store.gate.set()
        await each.redis.start()
        await each.redis.is_heard.wait()
        await each.directory.start()
        await each.directory.find(world.handle)
    pending = {each: False for each in processes}  # a change that was not notified
    for _ in range(STEPS):
        each = chance.choice(processes)
        match chance.randrange(9):
            case 0 | 1:
                world.change()
                pending = dict.fromkeys(processes, True)
            case 2:
                if chance.random() < 0.3:
                    world.delete()
                    pending = dict.fromkeys(processes, True)
            case 3:
                each.store.gate.clear()
            case 4:
                each.store.gate.set()
            case 5:
                each.redis.gate.clear()
            case 6:
                each.redis.gate.set()
            case 7:
                each.redis.hand_over()
                each.find()
            case _:
                if pending[each]:
                    pending[each] = False
                    each.notify()
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0.0005)
        for each in processes:
            each.look()
    for each in processes:
        each.redis.is_late = False
        each.redis.gate.set()
        each.store.gate.set()
        each.redis.hand_over()
        each.notify()
        each.find()
    newest = None if world.record is None else world.record.version
    await until(lambda: all(each.version == newest for each in processes))
    for each in processes:
        each.look()
        await asyncio.gather(*each.finds)
    raw = await processes[0].redis.command("GET", keys.tier(world.handle))
    entry = raw and unseal(vault, world.handle, raw)
    if entry and entry.record is not None and newest is not None:
        assert entry.version == newest
    for each in processes:
        await each.directory.stop()
        await each.redis.stop()
    assert [each.wrong for each in processes] == [[], [], []]
