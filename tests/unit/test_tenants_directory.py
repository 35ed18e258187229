"""The directory: what memory answers, what it asks the store, and what it tells.

The store here is a plain-Python one whose answers can be held back; the real one
is in integration/test_control_plane.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from ogelproxy.config import Control
from ogelproxy.errors import ControlUnavailable
from ogelproxy.tenants.directory import Directory, TenantDirectory
from ogelproxy.tenants.memory import MAX_UNKNOWN
from ogelproxy.tenants.model import Tenant, Tier
from ogelproxy.tenants.supplied import InMemoryDirectory

FREE = Tier("free", 5, 10, 1, False, 0, 5, 10, None, None, 1)
PRO = Tier("pro", 50, 200, 100, True, 50, 200, 500, 0.12, 0.04, None)


def tenant(handle: str, version: int = 1, tier: Tier = FREE) -> Tenant:
    return Tenant(uuid4(), handle, handle, tier, False, version, b"salt")


class SlowStore:
    """A store in memory; `gate` holds answers back, `is_away` refuses them."""

    def __init__(self, *tenants: Tenant) -> None:
        self.tenants = {tenant.handle: tenant for tenant in tenants}
        self.reads: list[list[str]] = []
        self.comparisons = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_away = False
        self.error: Exception | None = None
        self.changed: Callable[[str], None] = lambda payload: None
        self.attached: Callable[[bool], None] = lambda is_listening: None

    async def fetch_tenants(self, handles: Collection[str]) -> dict[str, Tenant]:
        found = {
            handle: self.tenants[handle] for handle in handles if handle in self.tenants
        }
        self.reads.append(list(handles))
        await self.gate.wait()
        self._check()
        return found

    async def fetch_versions(self, handles: Collection[str]) -> dict[str, int]:
        self.comparisons += 1
        self._check()
        return {
            handle: self.tenants[handle].version
            for handle in handles
            if handle in self.tenants
        }

    async def listen(
        self, changed: Callable[[str], None], attached: Callable[[bool], None]
    ) -> None:
        self.changed, self.attached = changed, attached
        attached(not self.is_away)
        await asyncio.Event().wait()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self.is_away:
            raise ControlUnavailable("away")

    def put(self, new: Tenant) -> None:
        """Commit a record and announce it."""
        self.tenants[new.handle] = new
        self.changed(f"org:{new.handle}")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Change = tuple[Tenant, Tenant | None]


class Watched(Directory):
    """A directory whose changes a test can await."""

    def __init__(self, store: SlowStore, config: Control, clock: Clock) -> None:
        super().__init__(store, config, clock)
        self.changes: asyncio.Queue[Change] = asyncio.Queue()
        self.subscribe(lambda old, new: self.changes.put_nowait((old, new)))


@asynccontextmanager
async def started(
    store: SlowStore, config: Control | None = None, clock: Clock | None = None
) -> AsyncIterator[Watched]:
    directory = Watched(store, config or Control(), clock or Clock())
    await directory.start()
    try:
        yield directory
    finally:
        await directory.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the loop has nothing left to do")


async def test_a_found_tenant_is_read_once() -> None:
    store = SlowStore(tenant("org_a"))
    async with started(store) as directory:
        first = await directory.find("org_a")
        assert first is store.tenants["org_a"]
        assert await directory.find("org_a") is first
        assert directory.peek("org_a") is first
        assert store.reads == [["org_a"]]
        assert len(directory) == 1


async def test_a_fresh_look_reads_what_no_message_told_of() -> None:
    store = SlowStore(tenant("org_a"))
    async with started(store) as directory:
        await directory.find("org_a")
        store.tenants["org_a"] = newer = tenant("org_a", version=2)
        assert await directory.refresh("org_a") is newer
        assert directory.peek("org_a") is newer
        store.is_away = True
        assert await directory.refresh("org_a") is newer


async def test_those_who_miss_at_once_share_one_read() -> None:
    store = SlowStore(tenant("org_a"))
    store.gate.clear()
    async with started(store) as directory:
        finds = [asyncio.create_task(directory.find("org_a")) for _ in range(50)]
        await until(lambda: bool(store.reads))
        finds += [asyncio.create_task(directory.find("org_a")) for _ in range(50)]
        await asyncio.sleep(0)
        store.gate.set()
        assert set(map(id, await asyncio.gather(*finds))) == {
            id(store.tenants["org_a"])
        }
        assert store.reads == [["org_a"]]


async def test_misses_that_gather_behind_a_read_are_read_together() -> None:
    store = SlowStore(*(tenant(f"org_{number}") for number in range(10)))
    store.gate.clear()
    async with started(store) as directory:
        finds = [asyncio.create_task(directory.find("org_0"))]
        await until(lambda: bool(store.reads))
        finds += [
            asyncio.create_task(directory.find(f"org_{number}"))
            for number in range(1, 10)
        ]
        await asyncio.sleep(0)
        store.gate.set()
        await asyncio.gather(*finds)
        assert [len(read) for read in store.reads] == [1, 9]


async def test_one_who_gives_up_does_not_take_the_answer_from_the_others() -> None:
    store = SlowStore(tenant("org_a"))
    store.gate.clear()
    async with started(store) as directory:
        impatient = asyncio.create_task(directory.find("org_a"))
        patient = asyncio.create_task(directory.find("org_a"))
        await until(lambda: bool(store.reads))
        impatient.cancel()
        store.gate.set()
        assert await patient is store.tenants["org_a"]


async def test_an_unknown_handle_is_remembered_for_the_negative_ttl() -> None:
    store, clock = SlowStore(), Clock()
    async with started(store, Control(negative_ttl=2.0), clock) as directory:
        assert await directory.find("org_a") is None
        clock.now += 1.9
        assert await directory.find("org_a") is None
        assert len(store.reads) == 1
        clock.now += 0.2
        assert await directory.find("org_a") is None
        assert len(store.reads) == 2


async def test_a_handle_that_can_not_exist_is_not_asked_for() -> None:
    store = SlowStore()
    async with started(store) as directory:
        for handle in ("", "a", "org_", "org_A", "org_" + "a" * 57, "org_a\n"):
            assert await directory.find(handle) is None
        assert store.reads == []


async def test_a_new_organisation_is_found_although_it_was_just_unknown() -> None:
    store = SlowStore()
    async with started(store) as directory:
        assert await directory.find("org_a") is None
        store.put(tenant("org_a"))
        assert await directory.find("org_a") is store.tenants["org_a"]


async def test_unknown_handles_are_bounded_and_push_no_tenant_out() -> None:
    store = SlowStore(tenant("org_a"))
    async with started(store, Control(max_tenants=1)) as directory:
        await directory.find("org_a")
        finds = (directory.find(f"org_x{number}") for number in range(MAX_UNKNOWN + 9))
        await asyncio.gather(*finds)
        assert directory.peek("org_a") is not None
        reads = len(store.reads)
        assert await directory.find("org_x9") is None  # still remembered
        assert len(store.reads) == reads
        assert await directory.find("org_x8") is None  # the oldest went
        assert len(store.reads) == reads + 1


async def test_a_change_reaches_memory_and_subscribers() -> None:
    old, new = tenant("org_a", 1), tenant("org_a", 2)
    store = SlowStore(old)
    async with started(store) as directory:
        await directory.find("org_a")
        store.put(new)
        assert await directory.changes.get() == (old, new)
        assert directory.peek("org_a") is new


async def test_a_deleted_organisation_is_told_as_none() -> None:
    old = tenant("org_a")
    store = SlowStore(old)
    async with started(store) as directory:
        await directory.find("org_a")
        del store.tenants["org_a"]
        store.changed("org:org_a")
        assert await directory.changes.get() == (old, None)
        assert await directory.find("org_a") is None


async def test_changes_of_tenants_not_in_memory_are_not_read() -> None:
    store = SlowStore(tenant("org_a"))
    async with started(store) as directory:
        store.put(tenant("org_b"))
        store.changed("nonsense")
        store.changed("")
        await directory.find("org_a")
        assert store.reads == [["org_a"]]


async def test_a_change_during_a_read_causes_another_read() -> None:
    old, new = tenant("org_a", 1), tenant("org_a", 2)
    store = SlowStore(old)
    store.gate.clear()
    async with started(store) as directory:
        find = asyncio.create_task(directory.find("org_a"))
        await until(lambda: bool(store.reads))  # and its answer is made: the old one
        store.put(new)
        store.gate.set()
        assert await find is old
        assert await directory.changes.get() == (old, new)
        assert directory.peek("org_a") is new


async def test_a_creation_during_a_read_is_not_taken_for_unknown() -> None:
    store = SlowStore()
    store.gate.clear()
    async with started(store) as directory:
        find = asyncio.create_task(directory.find("org_a"))
        await until(lambda: bool(store.reads))
        store.put(tenant("org_a"))
        store.gate.set()
        assert await find is None
        await until(lambda: directory.peek("org_a") is not None)
        assert await directory.find("org_a") is store.tenants["org_a"]


async def test_a_late_message_brings_no_old_record_back() -> None:
    store = SlowStore(tenant("org_a", 1))
    async with started(store) as directory:
        await directory.find("org_a")
        store.put(tenant("org_a", 2))
        await directory.changes.get()
        store.changed("org:org_a")
        await until(lambda: len(store.reads) == 3)
        await directory.find("org_a")
        assert directory.peek("org_a") is store.tenants["org_a"]
        assert directory.changes.empty()


async def test_a_tiers_change_reads_its_tenants_only() -> None:
    store = SlowStore(
        *(tenant(f"org_free{number}") for number in range(100)),
        tenant("org_pro", tier=PRO),
    )
    async with started(store) as directory:
        await asyncio.gather(*map(directory.find, store.tenants))
        store.reads.clear()
        for handle, record in store.tenants.items():
            if record.tier is FREE:
                store.tenants[handle] = dataclasses.replace(record, version=2)
        store.changed("tier:free")
        told = [await directory.changes.get() for _ in range(100)]
        assert all(new is not None and new.version == 2 for _, new in told)
        assert all("org_pro" not in read for read in store.reads)


async def test_a_failing_subscriber_does_not_keep_the_news_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = SlowStore(tenant("org_a", 1))
    directory = InMemoryDirectory(store.tenants.values())
    told: list[Change] = []

    def fail(old: Tenant, new: Tenant | None) -> None:
        raise ValueError("broken")

    directory.subscribe(fail)
    directory.subscribe(lambda old, new: told.append((old, new)))
    directory.put(tenant("org_a", 2))
    assert len(told) == 1
    assert "org_a" in caplog.text


async def test_the_least_recently_found_tenant_goes_first() -> None:
    store = SlowStore(*(tenant(f"org_{name}") for name in "abc"))
    async with started(store, Control(max_tenants=2)) as directory:
        for name in ("org_a", "org_b", "org_a", "org_c"):
            await directory.find(name)
        assert directory.peek("org_b") is None
        assert directory.peek("org_a") is not None
        assert len(directory) == 2


async def test_a_held_tenant_stays_and_hears_of_changes() -> None:
    store = SlowStore(*(tenant(f"org_{name}") for name in "abc"))
    async with started(store, Control(max_tenants=1)) as directory:
        await directory.find("org_a")
        directory.hold("org_a")
        directory.hold("org_a")
        directory.release("org_a")
        await directory.find("org_b")
        await directory.find("org_c")
        old = directory.peek("org_a")
        assert old is not None
        store.put(tenant("org_a", 2))
        assert (await directory.changes.get())[0] is old
        directory.release("org_a")
        await directory.find("org_b")
        assert directory.peek("org_a") is None
        assert len(directory) == 1


async def test_known_tenants_are_served_while_the_control_plane_is_away() -> None:
    store, clock = SlowStore(tenant("org_a")), Clock()
    async with started(store, Control(stale_ttl=100.0), clock) as directory:
        await directory.find("org_a")
        await until(lambda: not directory.is_degraded)
        assert directory.stale_since is None
        store.is_away = True
        store.attached(False)
        assert directory.stale_since == clock.now
        clock.now += 100
        assert await directory.find("org_a") is store.tenants["org_a"]
        with pytest.raises(ControlUnavailable):
            await directory.find("org_b")
        clock.now += 1
        with pytest.raises(ControlUnavailable):
            await directory.find("org_a")
        assert directory.peek("org_a") is not None


async def test_what_was_missed_while_away_is_found_by_comparing() -> None:
    kept, changed, gone = tenant("org_a"), tenant("org_b"), tenant("org_c")
    store = SlowStore(kept, changed, gone)
    async with started(store) as directory:
        await asyncio.gather(*map(directory.find, store.tenants))
        await until(lambda: not directory.is_degraded)
        store.attached(False)
        store.tenants["org_b"] = tenant("org_b", 2)
        del store.tenants["org_c"]
        store.reads.clear()
        store.attached(True)
        told = [await directory.changes.get() for _ in range(2)]
        assert told == [(changed, store.tenants["org_b"]), (gone, None)]
        await until(lambda: not directory.is_degraded)
        assert store.reads == [["org_b", "org_c"]]


async def test_a_message_that_was_lost_is_made_good_at_the_next_comparison() -> None:
    store = SlowStore(tenant("org_a", 1))
    async with started(store, Control(reconcile_interval=0.02)) as directory:
        await directory.find("org_a")
        store.tenants["org_a"] = tenant("org_a", 2)
        _, new = await directory.changes.get()
        assert new is store.tenants["org_a"]


async def test_a_look_that_failed_is_made_up_for_without_another_message() -> None:
    store = SlowStore(tenant("org_a", 1))
    async with started(store) as directory:
        await directory.find("org_a")
        await until(lambda: not directory.is_degraded)
        store.is_away = True
        store.put(tenant("org_a", 2))
        await until(lambda: directory.is_degraded)
        store.is_away = False
        assert (await directory.changes.get())[1] is store.tenants["org_a"]
        await until(lambda: not directory.is_degraded)


async def test_a_defect_of_the_store_leaves_nobody_waiting() -> None:
    store = SlowStore(tenant("org_a"))
    async with started(store) as directory:
        store.error = KeyError("a defect")
        with pytest.raises(ControlUnavailable, match="KeyError"):
            await directory.find("org_a")
        store.error = None
        assert await directory.find("org_a") is not None


async def test_it_starts_while_the_control_plane_is_away() -> None:
    store = SlowStore(tenant("org_a"))
    store.is_away = True
    async with started(store) as directory:
        assert directory.is_degraded
        with pytest.raises(ControlUnavailable):
            await directory.find("org_a")
        store.is_away = False
        store.attached(True)
        assert await directory.find("org_a") is not None
        await until(lambda: not directory.is_degraded)


async def test_stopping_answers_those_who_wait() -> None:
    store = SlowStore(tenant("org_a"))
    store.gate.clear()
    directory = Directory(store, Control())
    await directory.start()
    find = asyncio.create_task(directory.find("org_a"))
    await until(lambda: bool(store.reads))
    await directory.stop()
    with pytest.raises(ControlUnavailable):
        await find
    with pytest.raises(ControlUnavailable):
        await directory.find("org_a")


async def test_starting_raises_what_can_not_be_tried_again() -> None:
    class Malformed(SlowStore):
        async def listen(
            self, changed: Callable[[str], None], attached: Callable[[bool], None]
        ) -> None:
            raise LookupError("no such place")

    with pytest.raises(LookupError):
        await Directory(Malformed(), Control()).start()


async def test_records_in_memory_have_the_same_face() -> None:
    first = tenant("org_a", 2)
    memory = InMemoryDirectory([first])
    directory: TenantDirectory = memory
    told: list[Change] = []
    directory.subscribe(lambda old, new: told.append((old, new)))
    await directory.start()
    directory.hold("org_a")
    directory.release("org_a")
    assert await directory.find("org_a") is directory.peek("org_a") is first
    assert await directory.find("org_b") is None
    assert not directory.is_degraded and directory.stale_since is None
    memory.put(tenant("org_a", 1))
    assert directory.peek("org_a") is first
    second = tenant("org_a", 3)
    memory.put(second)
    memory.put(tenant("org_b"))
    memory.remove("org_a")
    memory.remove("org_a")
    assert told == [(first, second), (second, None)]
    assert len(directory) == 1
    await directory.stop()
