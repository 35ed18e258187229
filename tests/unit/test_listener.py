"""Listener: what is accepted."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any

from ogelproxy._reactor import Reactor
from ogelproxy.client import Client
from ogelproxy.config import Config
from ogelproxy.listener import Listener

OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
)


def test_what_is_accepted_sends_at_once_and_notices_a_dead_peer() -> None:
    async def check() -> list[int]:
        accepted: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        reactor = Reactor(asyncio.get_running_loop(), lambda *_: None)
        config = Config.model_validate({"listen": {"host": "127.0.0.1", "port": 0}})
        login: Any = SimpleNamespace(
            begin=lambda client, _: accepted.set_result(client)
        )
        relay: Any = SimpleNamespace(reactor=reactor, client_count=0)
        listener = Listener(config, login, relay)
        listener.open()
        with socket.create_connection(listener.address):
            client = await accepted
            assert not os.get_blocking(client.fd)
            with socket.socket(fileno=os.dup(client.fd)) as ours:
                values = [ours.getsockopt(*option) for option in OPTIONS]
            client.close()
        listener.close()
        reactor.stop()
        return values

    assert all(asyncio.run(check()))
