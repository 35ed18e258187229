"""Front: the slots of a whole machine, lent to its workers over their lines.

`Front` is in the supervisor, which is one host to all others (`slots`): a worker
that dies gives its slots back at once, one that is frozen keeps them. `LineSlots` is
what a worker's gate asks instead of Redis.

Messages: ``slot.take`` [number, organisation, maximum, version] is answered with
None, {"count": n} when there is no room, or {"away": why}; ``slot.give`` number,
also of a request under way; ``slot.total`` organisation with how many it has;
``slot.lost`` [number, code, text, detail] and
``slot.totals`` {organisation: n} from the supervisor. Numbers are the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ogelproxy.errors import (
    LineFailed,
    OgelError,
    RedisUnavailable,
    TooManyConnections,
)
from ogelproxy.line import Line
from ogelproxy.redis import Redis
from ogelproxy.slots import Slots
from ogelproxy.steps import in_task

#: Seconds between notes to workers of how many connections organisations have.
TOTALS_INTERVAL = 2.0
#: Seconds that an answer may take: longer than any login.
ANSWER_TIMEOUT = 900.0

#: Why a slot is lost, by code.
LOSSES = {each.code: each for each in (TooManyConnections, RedisUnavailable)}

Holder = TypeVar("Holder", bound=Hashable)


class Worker(Protocol):
    """Who is lent slots."""

    @property
    def line(self) -> Line: ...


@dataclass(slots=True, eq=False)
class _Lent:
    """A slot that a worker has or asks for."""

    worker: Worker
    number: int
    handle: str
    taking: asyncio.Task[int | None] | None = None  # None before it is asked for


class Front:
    """All workers' slots; `start` before use, `stop` when they have ended."""

    def __init__(self, redis: Redis, *, is_strict: bool) -> None:
        """`is_strict` as in `Slots`."""
        self.slots: Slots[_Lent] = Slots(redis, is_strict=is_strict, on_lost=self._lose)
        self._lent: dict[Worker, dict[int, _Lent]] = {}  # by number
        self._told: dict[Worker, dict[str, int]] = {}  # totals, by organisation
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.slots.start()
        self._telling = asyncio.create_task(self._tell_totals(), name="slot-totals")

    async def stop(self) -> None:
        """Give all slots back."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        for worker in list(self._lent):
            self.gone(worker)
        await self.slots.stop()

    # What workers say. Plain functions, so that their order is that of the line.

    def take(
        self, worker: Worker, body: tuple[int, str, int, int]
    ) -> Coroutine[Any, Any, dict[str, Any] | None]:
        """Begin to take a slot; the coroutine's result is the answer."""
        number, handle, maximum, version = body
        lent = _Lent(worker, number, handle)
        lent.taking = asyncio.create_task(
            self.slots.take(handle, lent, maximum, version)
        )
        self._lent.setdefault(worker, {})[number] = lent
        return self._answer(lent, lent.taking)

    async def _answer(
        self, lent: _Lent, taking: asyncio.Task[int | None]
    ) -> dict[str, Any] | None:
        try:
            count = await taking
        except RedisUnavailable as error:
            self._forget(lent)
            return {"away": str(error)}
        if count is not None:
            self._forget(lent)
            return {"count": count}
        return None

    def give(self, worker: Worker, number: int) -> None:
        """Take a slot back, or a request; not what was lost meanwhile."""
        lent = self._lent.get(worker, {}).get(number)
        if lent is not None:
            self._take_back(lent)

    def total(self, worker: Worker, handle: str) -> int:
        """Tell how many connections an organisation has over all machines."""
        return self.slots.total(handle)

    def gone(self, worker: Worker) -> None:
        """Take everything back from a worker that has ended."""
        for lent in list(self._lent.get(worker, {}).values()):
            self._take_back(lent)
        self._told.pop(worker, None)

    def _take_back(self, lent: _Lent) -> None:
        self._forget(lent)
        assert lent.taking is not None
        if not lent.taking.done():
            lent.taking.cancel()
        elif lent.taking.exception() is None and lent.taking.result() is None:
            self.slots.give(lent.handle, lent)

    def _forget(self, lent: _Lent) -> None:
        numbers = self._lent.get(lent.worker, {})
        if numbers.pop(lent.number, None) is not None and not numbers:
            del self._lent[lent.worker]

    # What workers are told.

    def _lose(self, lent: _Lent, error: OgelError) -> None:
        self._forget(lent)
        with contextlib.suppress(LineFailed):  # it ends anyway
            lent.worker.line.tell(
                "slot.lost", [lent.number, error.code, str(error), error.detail]
            )

    async def _tell_totals(self) -> None:
        while True:
            await asyncio.sleep(TOTALS_INTERVAL)
            for worker, numbers in list(self._lent.items()):
                handles = {lent.handle for lent in numbers.values()}
                totals = {handle: self.slots.total(handle) for handle in handles}
                if totals != self._told.get(worker):
                    self._told[worker] = totals
                    with contextlib.suppress(LineFailed):
                        worker.line.tell("slot.totals", totals)


class LineSlots(Generic[Holder]):
    """The slots of one worker, who asks its supervisor for them."""

    def __init__(
        self, line: Line, *, on_lost: Callable[[Holder, OgelError], None]
    ) -> None:
        """`on_lost` as in `Slots`."""
        self._line = line
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        # Both for all that have a slot or ask for one.
        self._holders: dict[int, Holder] = {}
        self._number_of: dict[Holder, int] = {}
        self._totals: dict[str, int] = {}  # by organisation, as last told
        line.on("slot.lost", self._lost)
        line.on("slot.totals", self._note_totals)

    async def take(
        self, handle: str, holder: Holder, maximum: int, version: int
    ) -> int | None:
        """Take a slot; see `Slots.take`. Raises LineFailed, too."""
        await in_task()
        number = next(self._numbers)
        self._holders[number] = holder
        self._number_of[holder] = number
        try:
            answer = await self._line.ask(
                "slot.take",
                [number, handle, maximum, version],
                answer_timeout=ANSWER_TIMEOUT,
            )
        except BaseException:
            # Whoever doesn't wait any more may have been granted it.
            if self._forget(number) is not None:
                self._tell_given(number)
            raise
        if answer is None:
            return None
        self._forget(number)
        if "away" in answer:
            raise RedisUnavailable(answer["away"])
        count: int = answer["count"]
        return count

    def give(self, handle: str, holder: Holder) -> None:
        """Give a slot back that was taken and not lost."""
        number = self._number_of[holder]
        self._forget(number)
        self._tell_given(number)

    def total(self, handle: str) -> int:
        """Return the connections over all machines, told every few seconds."""
        return self._totals.get(handle, 0)

    def _tell_given(self, number: int) -> None:
        # A supervisor that is gone has given everything back.
        with contextlib.suppress(LineFailed):
            self._line.tell("slot.give", number)

    def _forget(self, number: int) -> Holder | None:
        holder = self._holders.pop(number, None)
        if holder is not None:
            del self._number_of[holder]
        return holder

    def _lost(self, body: tuple[int, str, str, str]) -> None:
        number, code, text, detail = body
        holder = self._forget(number)
        if holder is not None:  # not given back at the same time
            self._on_lost(holder, LOSSES[code](text, detail=detail))

    def _note_totals(self, totals: dict[str, int]) -> None:
        self._totals = totals
