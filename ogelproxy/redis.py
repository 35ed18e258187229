"""Redis: the one way to the meeting point of workers and machines.

Owns the connections, their time limits and the knowledge whether it answers at
all; runs scripts in pipelines and hears channels. What is kept there, and what to
do without it, is its users': nothing here is retried, since only they know what
may be done twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as Client
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from ogelproxy.config import Redis as RedisConfig
from ogelproxy.errors import ConfigInvalid, RedisUnavailable
from ogelproxy.keys import HOSTS

logger = logging.getLogger(__name__)

#: Connections for commands. Scripts of one turn of the loop share one.
MAX_CONNECTIONS = 16
#: Seconds between tries to hear channels again.
SUBSCRIBE_INTERVAL = 0.5
#: Seconds of silence after which a connection that hears channels is asked whether
#: it is still there, and for its answer.
SILENCE_TIMEOUT = 2.0

#: Called with each message of a channel.
Hearer = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script; Redis knows it by its hash once it has seen it."""

    text: str

    @classmethod
    def read(cls, *names: str) -> Script:
        """Read one that lies beside this module, in one or several parts."""
        directory = Path(__file__).parent
        return cls("\n".join((directory / name).read_text() for name in names))

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


#: Keys and arguments of one run of a script.
Call = tuple[Sequence[str], Sequence[str | int | float]]


#: Notes in the registry of hosts that nobody has leases of an earlier run.
DECLARE_NEW = Script(
    "local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')\n"
    "return redis.call('HSET', KEYS[1], 'complete', run, 'new', run)"
)


class Redis:
    """A Redis server, or one that isn't there; start before use, stop at the end."""

    def __init__(self, config: RedisConfig) -> None:
        """Raises ConfigInvalid when there is no usable `redis.url`."""
        if config.url is None:
            raise ConfigInvalid("redis.url (REDIS_URL) is needed")
        #: Whether the latest command was answered; changed by every command.
        self.is_up = False
        self._timeout = config.timeout
        try:
            pool = BlockingConnectionPool.from_url(
                config.url.get_secret_value(),
                max_connections=MAX_CONNECTIONS,
                timeout=config.timeout,
                protocol=3,
                socket_timeout=config.timeout,
                socket_connect_timeout=config.timeout,
                # What failed may have been done: only its sender can tell.
                retry=Retry(NoBackoff(), 0),
                client_name="ogelproxy",
            )
        except ValueError as error:
            raise ConfigInvalid(f"redis.url: {error}") from None
        self._client = Client(connection_pool=pool)
        self._shas: dict[Script, str] = {}
        self._hearers: dict[str, Hearer] = {}  # by channel
        self._hearing: asyncio.Task[None] | None = None  # while something is heard
        #: Called with True when channels are heard (again), with False when not.
        self.on_heard: list[Callable[[bool], None]] = []

    async def start(self) -> None:
        """See whether it answers; that it doesn't is no error."""
        try:
            await self.command("PING")
        except RedisUnavailable as error:
            logger.warning("%s", error)
        if self._hearers:
            self._hearing = asyncio.create_task(self._hear(), name="redis-channels")

    async def stop(self) -> None:
        """Close all connections."""
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
            self._hearing = None
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def command(self, *words: str | int | float | bytes) -> Any:
        """Send one command and return its answer, texts as bytes.

        Raises RedisUnavailable, also when it refuses the command.
        """
        execute = cast(Callable[..., Awaitable[Any]], self._client.execute_command)
        return await self._watched(execute(*words))

    async def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script once per call, in one pipeline; return the answers.

        The calls are independent: each is done wholly or not at all. Raises
        RedisUnavailable when any answer is missing; some may have been done then.
        """
        answers = await self.run_each(script, calls)
        for answer in answers:
            if isinstance(answer, RedisUnavailable):
                raise answer
        return answers

    async def run_each(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script as `run` does, for calls that have nothing to do with another.

        In place of an answer that Redis refused is the RedisUnavailable that says so.
        Raises RedisUnavailable when there are no answers at all.
        """
        answers = await self._send(script, calls)
        unknown = [n for n, each in enumerate(answers) if _is_unknown(each)]
        if unknown:
            # A Redis that was restarted; what it doesn't know it has not run.
            await self.command("SCRIPT", "LOAD", script.text)
            again = await self._send(script, [calls[n] for n in unknown])
            for n, answer in zip(unknown, again, strict=True):
                answers[n] = answer
        return [
            RedisUnavailable(_text(each)) if isinstance(each, Exception) else each
            for each in answers
        ]

    async def _send(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        sha = self._shas.setdefault(script, script.sha)
        pipeline = self._client.pipeline(transaction=False)
        for keys, arguments in calls:
            pipeline.evalsha(sha, len(keys), *keys, *arguments)
        answers: list[Any] = await self._watched(pipeline.execute(raise_on_error=False))
        return answers

    async def declare_new(self) -> None:
        """Say that no process of ours knew this server before its latest start.

        Only who has just started it can know that. Leases are granted at once then,
        and not when all that could have been granted before have run out. Raises
        RedisUnavailable.
        """
        await self.run(DECLARE_NEW, [((HOSTS,), ())])

    def hear(self, channel: str, hearer: Hearer) -> None:
        """Call `hearer` with each message of a channel; before `start`.

        What is said while the connection is lost is not heard.
        """
        self._hearers[channel] = hearer

    async def say(self, channel: str, message: bytes) -> None:
        """Publish a message. Raises RedisUnavailable."""
        await self.command("PUBLISH", channel, message)

    async def _watched(self, work: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        cancel_count = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(self._timeout):
                answer = await work
        except ResponseError as error:
            raise RedisUnavailable(_text(error)) from error
        except (RedisError, OSError, TimeoutError) as error:
            self._note(False)
            raise RedisUnavailable(_text(error)) from error
        finally:
            # The client answers, or fails otherwise, though it was cancelled.
            if task and task.cancelling() > cancel_count:
                raise asyncio.CancelledError
        self._note(True)
        return answer

    def _note(self, is_up: bool) -> None:
        if is_up != self.is_up:
            self.is_up = is_up
            if is_up:
                logger.info("Redis answers")
            else:
                logger.warning("Redis does not answer: see docs/reliability.md")

    async def _hear(self) -> None:
        while True:
            listener = self._client.pubsub()
            try:
                await listener.subscribe(*self._hearers)
                await self._hear_out(listener)
            except (RedisError, OSError) as error:
                logger.warning("channels are not heard: %s", _text(error))
            finally:
                self._tell_heard(False)
                await cast(Callable[[], Awaitable[None]], listener.aclose)()
            await asyncio.sleep(SUBSCRIBE_INTERVAL)

    async def _hear_out(self, listener: PubSub) -> NoReturn:
        unheard = len(self._hearers)  # channels that are not subscribed to yet
        is_asked = False
        while True:
            message = await listener.get_message(timeout=SILENCE_TIMEOUT)
            if message is not None:
                is_asked = False
                if message["type"] == "message":
                    self._hand_over(message["channel"], message["data"])
                elif message["type"] == "subscribe":
                    unheard -= 1
                    if unheard == 0:
                        self._tell_heard(True)
            elif is_asked:
                raise ConnectionError("no answer from the connection that hears")
            else:
                is_asked = True
                await listener.ping()

    def _tell_heard(self, is_heard: bool) -> None:
        for tell in self.on_heard:
            tell(is_heard)

    def _hand_over(self, channel: bytes, message: bytes) -> None:
        try:
            self._hearers[channel.decode()](message)
        except Exception:
            logger.exception("a message of %s was not taken in", channel.decode())


def _is_unknown(answer: Any) -> bool:
    return isinstance(answer, NoScriptError)


def _text(error: BaseException) -> str:
    return f"Redis: {type(error).__name__}: {error}"
