"""Looks: handles to ask for in batches, and who waits for the answers.

One loop takes a batch, asks, and answers it, before it takes the next. What gathers
meanwhile is asked for once, however many want it.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Looks(Generic[Answer]):
    """Who waits for which handle. Futures are the waiting's own: one may give up."""

    def __init__(self) -> None:
        #: Handles of the next batches, first come first, and those who wait.
        self._wanted: dict[str, list[asyncio.Future[Answer]]] = {}
        #: Those of the batch that is being asked for, until they are answered.
        self._asked: dict[str, list[asyncio.Future[Answer]]] = {}
        self._is_wanted = asyncio.Event()  # set while _wanted holds something

    def __contains__(self, handle: str) -> bool:
        return handle in self._asked or handle in self._wanted

    def is_asked(self, handle: str) -> bool:
        """Whether the batch under way still lacks an answer for it."""
        return handle in self._asked

    @property
    def asked(self) -> list[str]:
        """The handles of the batch under way that have no answer yet."""
        return list(self._asked)

    def want(self, handle: str, *waiting: asyncio.Future[Answer]) -> None:
        """Ask for it after now: what is under way may have been read before."""
        self._wanted.setdefault(handle, []).extend(waiting)
        self._is_wanted.set()

    def join(self, handle: str, *waiting: asyncio.Future[Answer]) -> None:
        """Wait for what is under way, else `want`."""
        if handle in self._asked:
            self._asked[handle].extend(waiting)
        else:
            self.want(handle, *waiting)

    async def take(self, max_handles: int) -> list[str]:
        """Wait for the next batch, which is under way then."""
        await self._is_wanted.wait()
        batch = list(itertools.islice(self._wanted, max_handles))
        self._asked = {handle: self._wanted.pop(handle) for handle in batch}
        if not self._wanted:
            self._is_wanted.clear()
        return batch

    def release(self, handle: str) -> list[asyncio.Future[Answer]]:
        """End the look under way without an answer; return those who wait."""
        return self._asked.pop(handle, [])

    def answer(self, handle: str, answer: Answer) -> None:
        """End the look under way, if there is one."""
        for future in self.release(handle):
            if not future.done():
                future.set_result(answer)

    def refuse(self, error: Exception) -> None:
        """End all looks, also those not yet under way."""
        waiting = [*self._asked.values(), *self._wanted.values()]
        self._asked, self._wanted = {}, {}
        self._is_wanted.clear()
        for future in itertools.chain.from_iterable(waiting):
            if not future.done():
                future.set_exception(error)
                # Who waits may have been cancelled in this turn of the loop.
                future.exception()
