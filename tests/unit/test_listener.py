"""Listener: what is accepted."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from ogelproxy._accept import accept
from ogelproxy._reactor import Reactor
from ogelproxy.client import Client
from ogelproxy.config import Config, Listen
from ogelproxy.listener import Listener, bind

OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accepts_who_waits_with_address_and_port(host: str) -> None:
    with bind(Listen(host=host, port=0)) as listening:
        assert accept(listening.fileno()) is None
        with socket.create_connection(listening.getsockname()[:2]) as peer:
            accepted = accept(listening.fileno())
            assert accepted is not None
            with socket.socket(fileno=accepted[0]) as ours:
                assert accepted[1:] == peer.getsockname()[:2]
                assert not os.get_inheritable(ours.fileno())
        assert accept(listening.fileno()) is None


def test_accepting_on_what_is_no_socket_fails() -> None:
    with open(os.devnull) as null, pytest.raises(OSError, match="accept"):
        accept(null.fileno())


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
