"""The case `relay`: a query's whole way through the data plane, without Postgres.

From the far end of a client's socket to that of a server's and back, by the same
callbacks as in a proxy under load, with all that happens per query but the wait for
events. In time the kernel is the most of it; instructions are the proxy's own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from bench import loops
from bench.desk import Desk
from bench.exchanges import POINT, PREPARE, Exchange
from bench.micro import OURS, Micro, Repeated

READ_BYTES = 65536


class RelayCase(Micro):
    name = "relay"
    about = "a query's way through the data plane, with nobody at its ends"
    title = "Time of a query, both ends and the kernel included"
    unit = "protocol"
    names = tuple(POINT)

    def implementations(self, *, is_quick: bool) -> Sequence[str]:
        return [OURS]

    @contextmanager
    def opened(self, implementation: str) -> Iterator[Mapping[str, Repeated]]:
        queries = loops.load().Queries
        with Desk() as desk:
            client, client_end = desk.client()
            server, server_end = desk.server()
            server.enter_pool()
            _pass(desk, client_end, server_end, PREPARE)
            yield {
                protocol: queries(
                    client,
                    client_end.fileno(),
                    server,
                    server_end.fileno(),
                    exchange.request,
                    _pass(desk, client_end, server_end, exchange),
                    exchange.answer,
                )
                for protocol, exchange in POINT.items()
            }


CASE = RelayCase()


def _pass(
    desk: Desk, client: socket.socket, server: socket.socket, exchange: Exchange
) -> bytes:
    """Have a query relayed; return what the server was asked."""
    client.sendall(exchange.request)
    desk.reactor.turn()
    asked = server.recv(READ_BYTES)
    server.sendall(exchange.answer)
    desk.reactor.turn()
    client.recv(READ_BYTES)
    return asked
