"""Line: requests, answers and notes between two processes of one machine.

A Unix stream socket pair, a JSON document per text line. Both ends are alike:

    line = Line("worker 1")
    line.on("ping", lambda body: {"seen": body})  # or a coroutine function
    await line.open(sock)
    answer = await line.ask("ping", {"n": 1}, answer_timeout=1.0)
    line.tell("gone", {"org": "org_a"})           # no answer, in order
    await line.wait_closed()

What may be sent is what JSON knows; bytes go as text. Handlers that are plain
functions run in the order in which their messages were sent; coroutines run at
the same time. The peer is trusted: it is a process of ours.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any, cast

import orjson

from ogelproxy.errors import LineFailed, OgelError

log = logging.getLogger(__name__)

#: The longest message, in bytes: a console's table of all clients fits.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
#: Bytes that wait for a peer that doesn't read, beyond which it is given up.
MAX_UNSENT_BYTES = 4 * MAX_MESSAGE_BYTES
#: Requests without an answer yet, in each direction.
MAX_PENDING = 4096

#: Receives the body of a message. What it returns, or the coroutine that it returns
#: does, is the answer; an exception fails the request at the other end.
Handler = Callable[[Any], Any]


class Line(asyncio.Protocol):
    """One end of a line."""

    def __init__(self, peer: str) -> None:
        """`peer` names the other end, in the log and in errors."""
        self.peer = peer
        self._handlers: dict[str, Handler] = {}
        self._pending: dict[int, asyncio.Future[Any]] = {}  # by the request's number
        self._numbers = itertools.count(1)
        self._running: set[asyncio.Task[None]] = set()  # handlers of requests
        self._transport: asyncio.Transport | None = None  # None before it opens
        self._buffer = bytearray()  # the beginning of a message
        self._closed = asyncio.Event()

    def on(self, name: str, handler: Handler) -> None:
        """Let `handler` take messages of this name."""
        assert name not in self._handlers, name
        self._handlers[name] = handler

    async def open(self, sock: socket.socket) -> None:
        """Speak over one end of a socket pair, which is the line's from now on."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=sock)

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, name: str, body: Any = None, *, answer_timeout: float) -> Any:
        """Return the peer's answer, waited for at most `answer_timeout` seconds.

        Raises LineFailed: the line is closed, or closes; too many wait already;
        the peer has no such handler, or it failed. Raises TimeoutError.
        """
        if len(self._pending) >= MAX_PENDING:
            raise LineFailed(f"{self.peer}: too many requests wait for an answer")
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            self._send({"ask": name, "number": number, "body": body})
            async with asyncio.timeout(answer_timeout):
                return await answer
        finally:
            del self._pending[number]

    def tell(self, name: str, body: Any = None) -> None:
        """Send a note. Raises LineFailed when the line is closed."""
        self._send({"tell": name, "body": body})

    def close(self) -> None:
        """Send what waits to be sent, and hang up."""
        if self._transport is not None:
            self._transport.close()

    async def wait_closed(self) -> None:
        """Wait until either end hung up, or the peer died."""
        await self._closed.wait()

    def _send(self, message: dict[str, Any]) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise LineFailed(f"{self.peer}: the line is closed")
        data = orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)
        if len(data) > MAX_MESSAGE_BYTES:
            raise LineFailed(f"{self.peer}: a message of {len(data)} bytes is too long")
        transport.write(data)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._cut("does not read")

    def _cut(self, reason: str) -> None:
        assert self._transport is not None
        log.error("%s %s: the line is cut", self.peer, reason)
        self._transport.abort()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are none by type.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            message = bytes(self._buffer) + data[start:end]
            self._buffer.clear()
            start = end + 1
            try:
                self._take(orjson.loads(message))
            except orjson.JSONDecodeError:
                self._cut("says what is no message")
                return
        self._buffer += data[start:]
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            self._cut("says something that has no end")

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set()
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(LineFailed(f"{self.peer}: the line was closed"))

    # What the peer wants.

    def _take(self, message: dict[str, Any]) -> None:
        number = message.get("number")
        name = message.get("ask") or message.get("tell")
        if name is not None:
            self._handle(name, number, message["body"])
            return
        answer = self._pending.get(number) if number is not None else None
        if answer is None or answer.done():
            return  # it came too late: nobody waits any more
        if "error" in message:
            answer.set_exception(LineFailed(f"{self.peer}: {message['error']}"))
        else:
            answer.set_result(message["body"])

    def _handle(self, name: str, number: int | None, body: Any) -> None:
        handler = self._handlers.get(name)
        try:
            if handler is None:
                raise LineFailed(f"nobody takes {name!r}")
            if len(self._running) >= MAX_PENDING:
                raise LineFailed("too many requests at once")
            result = handler(body)
            if not inspect.iscoroutine(result):
                self._answer(number, result)
                return
        except Exception as error:
            self._fail(name, number, error)
            return
        task = asyncio.create_task(self._run(name, number, result))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(
        self, name: str, number: int | None, work: Coroutine[Any, Any, Any]
    ) -> None:
        try:
            self._answer(number, await work)
        except Exception as error:
            self._fail(name, number, error)

    def _answer(self, number: int | None, result: Any) -> None:
        if number is not None and self.is_open:
            self._send({"number": number, "body": result})

    def _fail(self, name: str, number: int | None, error: Exception) -> None:
        """Tell who asked; a defect, or a note that nobody is told of, is logged."""
        if number is None or not isinstance(error, OgelError):
            log.error("%s of %s failed", name, self.peer, exc_info=error)
        if number is not None and self.is_open:
            self._send({"number": number, "error": str(error)})
