"""Steps: a coroutine that runs in the events of its connection.

A login waits for its client, and mostly for nothing else. As long as that is so, the
reactor's callback resumes it at once: no task, no future and no turn of the loop. What
waits for anything else goes on in a task from there.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from ogelproxy._connection import MORE, Connection

#: What a coroutine yields that wants a task.
TASK = object()


@types.coroutine
def in_task() -> Generator[object, None, None]:
    """Go on in a task: `asyncio.timeout` and the like are for tasks only."""
    if asyncio.current_task() is None:
        yield TASK


class Steps:
    """One coroutine, from `start` to its end; it must close or keep its connection."""

    __slots__ = (
        *("_begin", "_before_task", "_connection", "_coroutine", "_ended"),
        *("_task", "_timer", "is_late"),
    )

    def __init__(
        self,
        connection: Connection,
        begin: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        ended: Callable[[], None],
    ) -> None:
        """`begin` starts the task, if there has to be one; `ended` is told the end."""
        self.is_late = False  # whether it is cancelled since its time is over
        self._connection = connection
        self._begin = begin
        self._ended = ended
        self._before_task: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._coroutine: Coroutine[Any, Any, None]
        self._timer: asyncio.TimerHandle

    def start(self, coroutine: Coroutine[Any, Any, None], seconds: float) -> None:
        """Run it; after `seconds` it is cancelled, where it waits."""
        self._coroutine = coroutine
        loop = self._connection.reactor.loop
        self._timer = loop.call_later(seconds, self._expire)
        self._connection.stepper = self._step
        self._step()

    def before_task(self, call: Callable[[], None]) -> None:
        """Have `call` called before it goes on in a task; at once where it does."""
        if self._task is None:
            self._before_task = call
        else:
            call()

    def _step(self, error: BaseException | None = None) -> None:
        try:
            if error is None:
                awaited = self._coroutine.send(None)
            else:
                awaited = self._coroutine.throw(error)
        except StopIteration:
            self._end()
        except BaseException:
            self._end()
            raise
        else:
            if awaited is not MORE:
                self._connection.stepper = None
                if self._before_task is not None:
                    self._before_task()
                self._task = self._begin(self._go_on(awaited))

    async def _go_on(self, awaited: object) -> None:
        try:
            await self._rest(awaited)
        finally:
            self._end()

    @types.coroutine
    def _rest(self, awaited: object) -> Generator[object, Any, None]:
        """Hand to the task what the coroutine waits for, and the answers back."""
        try:
            while True:
                try:
                    answer = None if awaited is TASK else (yield awaited)
                except BaseException as error:
                    awaited = self._coroutine.throw(error)
                else:
                    awaited = self._coroutine.send(answer)
        except StopIteration:
            return

    def _expire(self) -> None:
        self.is_late = True
        if self._task is not None:
            self._task.cancel()
        else:
            self._step(asyncio.CancelledError())

    def _end(self) -> None:
        self._timer.cancel()
        self._connection.stepper = None
        self._ended()
