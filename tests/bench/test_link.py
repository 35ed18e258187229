"""A link passes bytes on, holds answers back, cuts, and is good again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from bench.link import Link


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """A link to a server that says everything again."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with Link(server.sockets[0].getsockname()) as made:
        yield made
    server.close()


async def connect(
    link: Link,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def test_bytes_pass_in_order_and_so_does_the_end(link: Link) -> None:
    reader, writer = await connect(link)
    sent = b"".join(b"%07d" % number for number in range(100_000))
    writer.write(sent)
    assert await reader.readexactly(len(sent)) == sent
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()


async def test_an_answer_is_held_back_and_the_next_one_not_behind_it(
    link: Link,
) -> None:
    reader, writer = await connect(link)
    link.delay = 0.15
    began_at = time.monotonic()
    for part in (b"a", b"b", b"c"):
        writer.write(part)
        await asyncio.sleep(0.01)
    assert await reader.readexactly(3) == b"abc"
    assert 0.15 <= time.monotonic() - began_at < 0.45
    writer.close()


async def test_a_cut_ends_what_is_open_and_lets_no_other_in(link: Link) -> None:
    reader, writer = await connect(link)
    writer.write(b"a")
    assert await reader.readexactly(1) == b"a"
    await link.cut()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    late, late_writer = await connect(link)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await late.readexactly(1)
    link.heal()
    again, again_writer = await connect(link)
    again_writer.write(b"b")
    assert await again.readexactly(1) == b"b"
    for each in (writer, late_writer, again_writer):
        each.close()


async def test_a_cut_of_some_leaves_the_others(link: Link) -> None:
    kept, kept_writer = await connect(link)
    lost, lost_writer = await connect(link)
    for reader, writer in ((kept, kept_writer), (lost, lost_writer)):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
    port = lost_writer.get_extra_info("sockname")[1]
    await link.cut(lambda each: each == port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await lost.readexactly(1)
    kept_writer.write(b"b")
    assert await kept.readexactly(1) == b"b"
    for each in (kept_writer, lost_writer):
        each.close()
