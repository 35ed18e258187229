"""Supervisor: the workers of one machine, as one proxy.

Opens the sockets that they accept on, starts and replaces them, and is the one
that operators, signals and the workers themselves ask. Carries no client.

    async with Supervisor(config) as supervisor:
        print(supervisor.addresses)

A part that concerns the whole machine takes messages of all workers with `on`,
asks all of them with `ask_all`, and hears of those that are gone by `on_gone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

from ogelproxy.admin import Admin
from ogelproxy.cancel import CANCEL_TIMEOUT
from ogelproxy.config import Config
from ogelproxy.errors import ConfigInvalid, LineFailed, OgelError, WorkerFailed
from ogelproxy.front import Front
from ogelproxy.listener import bind_shared, load_tls
from ogelproxy.metrics import CounterSample, GaugeSample, Metrics, Sample, Totals
from ogelproxy.orders import Orders
from ogelproxy.place import Place, Process
from ogelproxy.redis import Redis

log = logging.getLogger(__name__)

#: Seconds that a worker has to answer what operators ask.
ANSWER_TIMEOUT = 1.0
#: Seconds beyond `drain_timeout` after which a worker that drains is killed: it has
#: usage to deliver.
STOP_TIMEOUT = 20.0

#: Takes the process that sent a message, and its body; see `Line.on`.
Handler = Callable[[Process, Any], Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one worker said to a question; one of the two is None."""

    process: Process
    body: Any = None
    error: str | None = None


class Supervisor:
    """Several workers that share one port of one machine."""

    def __init__(
        self, config: Config, *, reread: Callable[[], Config] | None = None
    ) -> None:
        """`reread` reads the settings anew, for an operator's RELOAD."""
        self.config = config
        #: Set when an operator's SHUTDOWN asked for the end.
        self.stop_asked = asyncio.Event()
        self.metrics = Metrics()
        #: All that live, those that drain or start too.
        self.processes: set[Process] = set()
        #: Called with each process that is gone.
        self.on_gone: list[Callable[[Process], None]] = []
        self._reread = reread
        self._handlers: dict[str, Handler] = {}
        self._places: list[Place] = []
        self._sockets: list[socket.socket] = []
        self._address: tuple[str, int] | None = None  # while it listens
        self._keepers: list[asyncio.Task[None]] = []  # one per place
        self._rolling: asyncio.Task[None] | None = None
        self._admin = Admin(config.admin, self)
        self._redis: Redis | None = None  # while started
        self._front: Front | None = None  # likewise
        self._past = Totals()  # counters of workers that are gone
        self._silence_count = 0  # questions that went without an answer
        self._is_draining = False
        self._is_shutting_down = False  # workers end by themselves, unreplaced
        self._orders = Orders()
        # Who was told of the orders, or of the settings, and has to be of new ones.
        self._ordered: set[Process] = set()
        self._enlisted: set[Process] = set()
        self.metrics.add_source(self._samples)
        self.on("enlist", self._enlist)
        self.on("leaving", self._leaving)
        self.on("farewell", self._farewell)
        self.on("reload", self._reload)
        self.on("orders", self._tell_orders)
        self.on("order", self._order)
        self.on("shutdown", self._shutdown)
        self.on("cancel", self._cancel)
        self.on("everyone", self._everyone)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # Starting and stopping.

    async def start(self) -> None:
        """Start all workers; all accept when this returns.

        Raises ConfigInvalid, WorkerFailed when one can't start, or OSError when a
        port is taken; nothing is left running then.
        """
        try:
            await self._start()
        except BaseException:
            await self._end(0.0)
            await self._admin.stop()
            raise

    async def _start(self) -> None:
        config = self.config
        if config.redis.url is None:
            raise ConfigInvalid(
                f"redis.url (REDIS_URL) is needed for {config.workers} workers"
            )
        load_tls(config.tls)
        await self._open_front(Redis(config.redis))
        self._sockets = bind_shared(config.listen, config.workers)
        host, port = self._sockets[0].getsockname()[:2]
        self._address = (host, port)
        self._places = [
            Place(number, sock, introduce=self._introduce, gone=self._gone)
            for number, sock in enumerate(self._sockets, 1)
        ]
        await self._admin.start()
        fills = [asyncio.create_task(place.fill()) for place in self._places]
        try:
            await asyncio.gather(*fills)
        except BaseException:
            for fill in fills:
                fill.cancel()
            await asyncio.gather(*fills, return_exceptions=True)
            raise
        self._keepers = [asyncio.create_task(place.keep()) for place in self._places]

    async def _open_front(self, redis: Redis) -> None:
        """Hold the slots of all workers' connections."""
        self._redis = redis
        self._front = Front(redis, is_strict=not self.config.limits.floor)
        self.on("slot.take", self._front.take)
        self.on("slot.give", self._front.give)
        self.on("slot.total", self._front.total)
        self.on_gone.append(self._front.gone)
        await redis.start()
        await self._front.start()

    async def drain(self) -> None:
        """Accept no more, and let workers end; bounded by `drain_timeout`."""
        await self._end(self.config.drain_timeout)

    async def stop(self) -> None:
        """Drain, and end everything."""
        if not self._is_draining:
            await self.drain()
        await self._admin.stop()

    async def _end(self, grace: float) -> None:
        tasks = self._close()
        await asyncio.gather(*tasks, return_exceptions=True)
        processes = list(self.processes)
        for process in processes:
            process.drain()
        try:
            async with asyncio.timeout(grace + STOP_TIMEOUT):
                for process in processes:
                    await process.ended.wait()
        except TimeoutError:
            for process in self.processes:
                log.error("worker %d does not end: killed", process.place)
                process.kill()
            for process in processes:
                await process.ended.wait()
        if self._front is not None:
            await self._front.stop()
        if self._redis is not None:
            await self._redis.stop()

    def _close(self) -> list[asyncio.Task[None]]:
        """Accept no more, and replace nobody; return the tasks that end now."""
        self._is_draining = True
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        tasks = [*self._keepers, *([self._rolling] if self._rolling else ())]
        for task in tasks:
            task.cancel()
        return tasks

    def reload(self, config: Config) -> None:
        """Give new settings to all workers. Raises ConfigInvalid.

        How many there are, and where they listen, needs a restart.
        """
        load_tls(config.tls)
        self.config = config
        for process in self._enlisted:
            with contextlib.suppress(LineFailed):  # it has ended
                process.line.tell("reload", self._settings())
        log.info("settings reloaded")

    def roll(self) -> None:
        """Begin to replace all workers, one after the other."""
        if self._is_draining or (self._rolling and not self._rolling.done()):
            log.warning("not rolled: workers are being replaced already")
            return
        self._rolling = asyncio.create_task(self._roll())

    async def _roll(self) -> None:
        log.info("replacing all workers")
        try:
            for place in self._places:
                await place.replace(self.config.drain_timeout + STOP_TIMEOUT)
        except (OgelError, OSError) as error:
            log.error("replacing workers ended early: %s", error)
        else:
            log.info("all workers are replaced")

    # What workers say.

    def on(self, name: str, handler: Handler) -> None:
        """Let `handler` take messages of this name; before the start."""
        assert name not in self._handlers, name
        self._handlers[name] = handler

    async def ask_all(
        self,
        name: str,
        body: Any = None,
        *,
        but: Process | None = None,
        only: Collection[Process] | None = None,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> list[Answer]:
        """Ask every worker that has started, or `only` some, `but` one; by place.

        Those that hung up, or do meanwhile, have ended, and are left out.
        """

        async def ask(process: Process) -> Answer | None:
            try:
                said = await process.line.ask(name, body, answer_timeout=answer_timeout)
            except TimeoutError:
                self._silence_count += 1
                return Answer(process, error=f"no answer within {answer_timeout} s")
            except LineFailed as error:
                if not process.line.is_open:
                    return None
                return Answer(process, error=str(error))
            return Answer(process, said)

        if only is None:
            only = [
                process
                for process in self.processes
                if process.state in ("ready", "draining")
            ]
        asked = [process for process in only if process is not but]
        asked.sort(key=lambda process: (process.place, process.started_at))
        answers = await asyncio.gather(*map(ask, asked))
        return [answer for answer in answers if answer is not None]

    def _introduce(self, process: Process) -> None:
        self.processes.add(process)
        for name, handler in self._handlers.items():
            process.line.on(name, _bound(handler, process))

    def _gone(self, process: Process) -> None:
        self.processes.discard(process)
        if process.totals is not None:
            self._past.merge(process.totals, with_gauges=False)
        self._ordered.discard(process)
        self._enlisted.discard(process)
        for tell in self.on_gone:
            tell(process)
        if self._is_shutting_down and not self.processes:
            self.stop_asked.set()

    def _settings(self) -> str:
        admin = self.config.admin.model_copy(update={"port": None})
        return self.config.model_copy(update={"admin": admin}).dump().decode()

    def _enlist(self, process: Process, body: None) -> str:
        self._enlisted.add(process)
        return self._settings()

    def _leaving(self, process: Process, body: None) -> None:
        if process.state == "ready":
            self._places[process.place - 1].leave(process)

    def _farewell(self, process: Process, totals: Mapping[str, Any]) -> None:
        process.totals = totals

    async def _reload(self, process: Process, body: None) -> None:
        """Read the settings anew. Raises WorkerFailed for those that don't take them.

        ConfigInvalid is raised before any has.
        """
        if self._reread is None:
            raise ConfigInvalid("this supervisor was given its settings, not a file")
        config = self._reread()
        load_tls(config.tls)
        self.config = config
        answers = await self.ask_all("reload", self._settings(), only=self._enlisted)
        if troubles := _troubles(answers):
            raise WorkerFailed("; ".join(troubles))
        log.info("settings reloaded")

    def _tell_orders(self, process: Process, body: None) -> dict[str, Any]:
        """Tell a worker that starts, and tell it of changes from now on."""
        self._ordered.add(process)
        return self._orders.dump()

    async def _order(self, process: Process, body: tuple[str, str | None]) -> Any:
        """Have all workers obey an operator's order, and those that come later.

        Body: verb and target, as in `Orders.change`. Answer: ``refused``, why there
        is nothing to do, or empty; ``silent``, a text for each that did not answer.
        """
        verb, target_id = body
        refused = self._orders.change(verb, UUID(target_id) if target_id else None)
        answers = []
        if not refused:
            answers = await self.ask_all(
                "orders", self._orders.dump(), only=self._ordered
            )
        return {"refused": refused, "silent": _troubles(answers)}

    def _shutdown(self, process: Process, mode: str) -> None:
        """End as an operator wants it; the answer goes out first."""
        asyncio.get_running_loop().call_soon(self._shut_down, mode)

    def _shut_down(self, mode: str) -> None:
        log.info("shutting down")
        self._close()
        self._is_shutting_down = True
        for process in self.processes:
            with contextlib.suppress(LineFailed):  # it has ended, or does
                process.line.tell("shutdown", mode)
        if not mode:
            self.stop_asked.set()

    async def _cancel(self, process: Process, key: Mapping[str, Any]) -> bool:
        """Ask the other workers whether one knows this cancel key."""
        answers = await self.ask_all(
            "cancel", key, but=process, answer_timeout=CANCEL_TIMEOUT
        )
        return any(answer.body for answer in answers)

    async def _everyone(
        self, process: Process, body: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Ask all workers but the one that asks, for it.

        Body: ``name``, ``body``, ``timeout`` in seconds, and ``pids`` where only some
        are meant. Answer, per worker: ``place``, ``pid``, and ``body`` or ``error``.
        """
        pids = body["pids"]
        answers = await self.ask_all(
            body["name"],
            body["body"],
            but=process,
            only=None if pids is None else [p for p in self.processes if p.pid in pids],
            answer_timeout=body["timeout"],
        )
        return [
            {"place": each.process.place, "pid": each.process.pid}
            | ({"body": each.body} if each.error is None else {"error": each.error})
            for each in answers
        ]

    # What it tells.

    @property
    def addresses(self) -> Mapping[str, tuple[str, int] | None]:
        """Where clients (`postgres`) and operators (`admin`) connect."""
        admin = self._admin.port
        return {
            "postgres": self._address,
            "admin": (self.config.admin.host, admin) if admin else None,
        }

    @property
    def is_ready(self) -> bool:
        """Whether a worker accepts in every place."""
        return not self._is_draining and not self._vacant

    @property
    def _vacant(self) -> list[int]:
        return [place.number for place in self._places if place.current is None]

    async def describe(self) -> Mapping[str, Any]:
        """Return a picture of all workers for operators, without secrets."""
        answers = {each.process: each for each in await self.ask_all("status")}
        workers = []
        for process in sorted(self.processes, key=lambda each: each.place):
            worker: dict[str, Any] = {
                "place": process.place,
                "pid": process.pid,
                "state": process.state,
                "started_at": process.started_at,
            }
            answer = answers.get(process)
            if answer is not None and answer.error is not None:
                worker["error"] = answer.error
            elif answer is not None:
                worker["status"] = answer.body
            workers.append(worker)
        reasons = [f"no worker in place {number}" for number in self._vacant]
        return {
            "ready": self.is_ready,
            "reasons": [*(["draining"] if self._is_draining else ()), *reasons],
            "draining": self._is_draining,
            "clients": sum(
                each.body["clients"] for each in answers.values() if each.body
            ),
            "restarts": self._restart_count,
            "workers": workers,
        }

    async def render(self) -> bytes:
        """Return the metrics of all workers together.

        Of one that doesn't answer in time, and of those that are gone, the counters
        stay as they were last seen, so that no sum ever falls.
        """
        answers = await self.ask_all("metrics")
        living = set()
        for answer in answers:
            if answer.error is None:
                answer.process.totals = answer.body
                living.add(answer.process)
        totals = self.metrics.totals()
        totals.merge(self._past.pack(), with_gauges=False)
        for process in self.processes:
            if process.totals is not None:
                totals.merge(process.totals, with_gauges=process in living)
        return totals.render()

    @property
    def _restart_count(self) -> int:
        return sum(place.restart_count for place in self._places)

    def _samples(self) -> Iterator[Sample]:
        ready = sum(place.current is not None for place in self._places)
        yield GaugeSample("o7s_workers", {}, ready)
        yield CounterSample("o7s_worker_restarts_total", {}, self._restart_count)
        yield CounterSample("o7s_worker_silences_total", {}, self._silence_count)
        if self._front is not None:
            unproven = self._front.slots.unproven_count
            yield GaugeSample("o7s_unproven_connections", {}, unproven)


def _troubles(answers: Iterable[Answer]) -> list[str]:
    """Return a text for each worker that did not do what it was asked to."""
    return [
        f"worker {each.process.place} (process {each.process.pid}): {reason}"
        for each in answers
        if (reason := each.error or each.body)
    ]


def _bound(handler: Handler, process: Process) -> Callable[[Any], Any]:
    return lambda body: handler(process, body)
