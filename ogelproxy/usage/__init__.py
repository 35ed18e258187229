"""What was used: Meter keeps the table, closes batches, hands them to sinks.

A query is counted in `_usage` and never waits for anything here. The spool's
disk work runs in a thread of its own; sinks are tried again until they take
what they are given. The rules of the estimates are written at `UsageTable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.config import Usage
from ogelproxy.errors import OgelError, ServerBusy, SpoolUnusable
from ogelproxy.tenants.model import Target, Tenant
from ogelproxy.usage.ledger import Ledger
from ogelproxy.usage.sinks import HOUR, MemorySink, PostgresSink, Sink, retry_interval
from ogelproxy.usage.spool import Batch, Payer, Row, read_batch
from ogelproxy.usage.spools import Spools

__all__ = [
    "Attribution",
    "Batch",
    "MemorySink",
    "Meter",
    "Payer",
    "PostgresSink",
    "Row",
    "Sink",
    "UsageTable",
]

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: Application names of one organisation that are told apart in one batch. Clients
#: choose them: beyond this they share one, and take no room from other tenants.
MAX_APPLICATION_NAMES = 64
OTHER_APPLICATIONS = "(other)"

#: Seconds between looks for what processes that are gone left.
ADOPT_INTERVAL = 10.0

#: Seconds for one batch; a sink that hangs is a sink that fails.
DELIVERY_TIMEOUT = 30.0


class Outlet:
    """One sink and how far it is."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.taken: set[Path] = set()  # batches it has, that other sinks lack
        self.turn = asyncio.Lock()  # one delivery at a time, in order
        self.ready = asyncio.Event()  # a batch was closed
        self.failures = 0  # tries since the last batch it took


class Meter:
    """The usage of one process: counted in `table`, closed, spooled, delivered.

    Relays hold `table` for good: it moves from batch to batch by itself. `clock`
    is monotonic. Starts and stops once.
    """

    def __init__(
        self,
        config: Usage,
        sinks: Sequence[Sink],
        clock: Callable[[], float] = time.monotonic,
        *,
        is_shared: bool = False,
    ) -> None:
        """`is_shared`: other processes have the same `spool_dir`."""
        if not sinks:
            raise ValueError("a Meter needs a sink")
        self.table = UsageTable(config.max_rows)
        self.ledger = Ledger(self.table)  # today's sums, for who asks
        self.delivered_count = 0  # batches that every sink took
        self.spooled_count = 0  # closed batches that wait for a sink
        self.spool_bytes = 0  # of all batch files, open ones included
        self.is_nearly_full = False  # the spool: see Spool
        self.is_blocked = False  # no new batch could be opened: disk or spool full
        self._config = config
        self._clock = clock
        self._spool = Spools(
            config.spool_dir,
            config.max_spool_bytes,
            self.table.file_bytes,
            is_shared=is_shared,
        )
        self._outlets = [Outlet(sink) for sink in (*sinks, self.ledger)]
        self._attributions: WeakValueDictionary[
            tuple[UUID, str, str, str, int, str], Attribution
        ] = WeakValueDictionary()
        # Who has a place in the open batch keeps it: a client that comes again and
        # again takes one place, not many.
        self._seen: set[Attribution] = set()
        self._names: dict[UUID, set[str]] = {}  # application names in the batch
        self._disk = ThreadPoolExecutor(1, "usage-spool")
        self._rotating = asyncio.Lock()
        self._wake = asyncio.Event()  # look at the batch now
        self._path: Path | None = None  # the open batch; None while not running
        self._opened_at = 0.0  # by `clock`; of its first count, to one interval
        self._hour = 0.0  # of Unix time / 3600, when it was opened
        self._is_stopping = False
        self._keeper: asyncio.Task[None] | None = None
        self._feeders: list[asyncio.Task[None]] = []
        self._adopter: asyncio.Task[None] | None = None

    @property
    def spool_state(self) -> str:
        """Say in a word or two how the spool is, for operators."""
        if self.is_blocked:
            return "full"
        return "nearly full" if self.is_nearly_full else "ok"

    async def start(self) -> None:
        """Take the spool, open the first batch, deliver what was left there.

        Raises SpoolUnusable, or OSError when the disk has no room for a batch.
        """
        await self._on_disk(self._spool.open)
        try:
            path = await self._on_disk(self._spool.open_batch)
            self.table.rotate(path)
        except BaseException:
            await self._on_disk(self._spool.close)
            raise
        self._path = path
        self._begin()
        await self._survey()
        self._keeper = asyncio.create_task(self._keep(), name="usage-keeper")
        for outlet in self._outlets:
            outlet.ready.set()
            self._feeders.append(
                asyncio.create_task(self._feed(outlet), name="usage-feeder")
            )
        self._adopter = asyncio.create_task(self._adopt(), name="usage-adopter")

    async def stop(self, grace: float = 10.0) -> None:
        """Close the batch and deliver for at most `grace` seconds.

        What the sinks didn't take stays in the spool for the next start.
        """
        if self._keeper is None:
            return
        self._is_stopping = True
        self._wake.set()
        await self._keeper
        self._keeper = None
        assert self._adopter is not None
        tasks = [*self._feeders, self._adopter]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._rotating:
            path, self._path = self._path, None
            used_bytes = self.table.close()
            if path is not None:
                await self._on_disk(self._spool.seal, path, used_bytes)
        try:
            async with asyncio.timeout(grace):
                await self._deliver_all()
        except Exception as error:
            logger.warning("usage stays in the spool: %s", _text(error))
        await self._on_disk(self._spool.close)
        self._disk.shutdown()

    async def flush(self) -> None:
        """Close the batch and deliver all closed ones now, trying each sink once.

        Raises OSError or SpoolUnusable when no batch could be opened, and an
        ExceptionGroup of what the sinks raised.
        """
        await self._close_batch()
        await self._deliver_all()

    def attribution(
        self, tenant: Tenant, target: Target, application_name: str
    ) -> Attribution:
        """Return who pays for the queries of a client, the same for alike clients.

        Beyond `MAX_APPLICATION_NAMES` in one batch, an organisation's names are
        not told apart. Raises ServerBusy when `usage.max_rows` different ones are
        in use.
        """
        names = self._names.setdefault(tenant.id, set())
        if application_name not in names and len(names) >= MAX_APPLICATION_NAMES:
            application_name = OTHER_APPLICATIONS
        tier = tenant.tier
        key = (
            tenant.id,
            target.name,
            target.type.value,
            tier.name,
            tier.work_mem_kb,
            application_name,
        )
        found = self._attributions.get(key)
        if found is None:
            try:
                found = Attribution(
                    self.table,
                    tenant.id.bytes,
                    handle=tenant.handle,
                    database=target.name,
                    database_type=target.type.value,
                    tier=tier.name,
                    application_name=application_name,
                    work_mem_bytes=tier.work_mem_kb * 1024,
                )
            except ServerBusy:
                if not self.is_blocked:
                    self._wake.set()
                raise
            self._attributions[key] = found
        names.add(application_name)
        self._seen.add(found)
        return found

    async def _keep(self) -> None:
        """Write the open batch to the disk, and close it when it is time."""
        while not self._is_stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.sync_interval):
                    await self._wake.wait()
            self._wake.clear()
            try:
                if self.table.is_empty:
                    self._begin()
                elif self._is_due() and not self._is_stopping:
                    await self._close_batch()
                elif self._path is not None:
                    await self._on_disk(self._spool.sync, self._path)
            except Exception as error:
                # Whatever it is, counting goes on in the batch there is and the
                # next turn tries again: billing has no one else to keep it.
                logger.warning("usage could not be written: %s", _text(error))

    def _begin(self) -> None:
        """Start to time a batch in which nothing is counted yet."""
        self._opened_at = self._clock()
        self._hour = time.time() // HOUR
        self._seen.clear()
        self._names.clear()

    def _is_due(self) -> bool:
        return (
            self.table.is_full
            or self._clock() - self._opened_at >= self._config.batch_interval
            # Totals are per hour, and a row belongs to one hour only.
            or time.time() // HOUR != self._hour
        )

    async def _close_batch(self) -> None:
        async with self._rotating:
            if self._path is None or self.table.is_empty:
                return
            try:
                path = await self._on_disk(self._spool.open_batch)
            except (OSError, OgelError):
                self.is_blocked = True
                await self._survey()
                raise
            self.is_blocked = False
            left, self._path = self._path, path
            used_bytes = self.table.rotate(path)
            self._begin()
            await self._on_disk(self._spool.seal, left, used_bytes)
            await self._survey()
        for outlet in self._outlets:
            outlet.ready.set()

    async def _feed(self, outlet: Outlet) -> None:
        """Deliver to one sink for ever, slower while it fails."""
        while True:
            await outlet.ready.wait()
            outlet.ready.clear()
            try:
                await self._deliver(outlet)
            except Exception as error:
                interval = retry_interval(outlet.failures)
                logger.warning(
                    "usage was not delivered, next try in %.1f s: %s",
                    interval,
                    _text(error),
                )
                outlet.ready.set()
                await asyncio.sleep(interval)

    async def _adopt(self) -> None:
        """Look for what others left, for ever."""
        while True:
            try:
                if await self._on_disk(self._spool.adopt):
                    for outlet in self._outlets:
                        outlet.ready.set()
            except OSError as error:
                logger.warning("usage that was left was not found: %s", _text(error))
            await asyncio.sleep(ADOPT_INTERVAL)

    async def _deliver_all(self) -> None:
        results = await asyncio.gather(
            *map(self._deliver, self._outlets), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise ExceptionGroup("usage was not delivered", errors)

    async def _deliver(self, outlet: Outlet) -> None:
        """Give one sink what it lacks, oldest first, up to the first failure."""
        async with outlet.turn:
            for path in await self._on_disk(self._spool.closed):
                if path in outlet.taken:
                    continue
                try:
                    batch = await self._on_disk(read_batch, path)
                except FileNotFoundError:
                    # Every sink has it, this one too, since the list was made.
                    continue
                except SpoolUnusable as error:
                    logger.error("usage batch was set aside: %s", error)
                    await self._on_disk(self._spool.set_aside, path)
                    continue
                if batch.unreadable:
                    logger.error(
                        "usage batch %s lost %d rows in a crash of the machine",
                        batch.id,
                        batch.unreadable,
                    )
                try:
                    async with asyncio.timeout(DELIVERY_TIMEOUT):
                        await outlet.sink.deliver(batch)
                except Exception:
                    outlet.failures += 1
                    raise
                outlet.failures = 0
                outlet.taken.add(path)
                if all(path in other.taken for other in self._outlets):
                    await self._on_disk(self._spool.remove, path)
                    for other in self._outlets:
                        other.taken.discard(path)
                    self.delivered_count += 1
            await self._survey()

    async def _survey(self) -> None:
        """Bring the numbers for the metrics up to date."""
        self.spooled_count = len(await self._on_disk(self._spool.closed))
        self.spool_bytes = await self._on_disk(self._spool.used_bytes)
        was_nearly_full = self.is_nearly_full
        self.is_nearly_full = await self._on_disk(self._spool.is_nearly_full)
        if self.is_nearly_full and not was_nearly_full:
            logger.error("the usage spool is nearly full: are the sinks reachable?")

    async def _on_disk(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run `function` in the one thread that uses the spool."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._disk, call)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
