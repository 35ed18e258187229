"""Link: a TCP connection's way through this process, which can be made bad.

Stands between a part and what it depends on. Answers can be delayed, all of it can
be cut, and new connections refused; bytes pass unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

CHUNK_BYTES = 65_536
#: Chunks that a delayed answer may have in flight.
MAX_CHUNKS = 256

Address = tuple[str, int]


class Link:
    """Listens on a port of loopback and passes on to `target`; use `async with`."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.delay = 0.0  # seconds that each answer is held back
        # Whether a connection from this port is ended; None while all may pass.
        self._is_cut: Callable[[int], bool] | None = None
        self._server: asyncio.Server | None = None
        self._passing: dict[asyncio.Task[None], int] = {}  # ports they come from

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *failure: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    @property
    def port(self) -> int:
        """The port to connect to instead of the target's."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def cut(self, is_cut: Callable[[int], bool] = lambda port: True) -> None:
        """End connections, and let no others in until `heal`.

        All of them, or those from ports for which `is_cut` is true.
        """
        self._is_cut = is_cut
        passing = [task for task, port in self._passing.items() if is_cut(port)]
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    def heal(self) -> None:
        """Be a good link again."""
        self._is_cut = None
        self.delay = 0.0

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        port: int = writer.get_extra_info("peername")[1]
        self._passing[task] = port
        try:
            if self._is_cut is None or not self._is_cut(port):
                await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # a connection that breaks is what a link is for
        finally:
            del self._passing[task]
            writer.transport.abort()

    async def _connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        try:
            await _until_one_ends(
                asyncio.create_task(_pump(reader, far_writer, lambda: 0.0)),
                asyncio.create_task(_pump(far_reader, writer, lambda: self.delay)),
            )
        finally:
            far_writer.transport.abort()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    delay: Callable[[], float],
) -> None:
    """Pass bytes on in order, each chunk when its delay is over, until the end."""
    due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
    clock = asyncio.get_running_loop().time

    async def write() -> None:
        while True:
            time, data = await due.get()
            if (left := time - clock()) > 0:
                await asyncio.sleep(left)
            if not data:
                return
            writer.write(data)
            await writer.drain()

    async def read() -> None:
        data = b"."
        while data:
            data = await reader.read(CHUNK_BYTES)
            await due.put((clock() + delay(), data))

    with contextlib.suppress(OSError):
        await asyncio.gather(read(), write())


async def _until_one_ends(*tasks: asyncio.Task[None]) -> None:
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
