import asyncio
import ssl
from collections.abc import Callable
from typing import Any

class Reactor:
    """Watches the descriptors of one engine through one epoll in `loop`.

    `on_crash(connection, error)` is called when a connection's compiled code
    raised; the connection is still open then.
    """

    loop: asyncio.AbstractEventLoop
    now: float
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_crash: Callable[[Any, Exception], None],
    ) -> None: ...
    @property
    def connections(self) -> list[Any]:
        """The open connections."""
    def leave(self) -> None:
        """End the turn after this event: the loop has something to do."""
    def turn(self) -> None:
        """Handle every connection that is ready."""
    def schedule(self) -> None:
        """Have the loop call `run_scheduled` soon, once."""
    def run_scheduled(self) -> None:
        """Do what was put off until the present event was done."""
    def stop(self) -> None:
        """Stop watching; connections must be closed before."""

class Descriptor:
    """Owns a non-blocking descriptor and the bytes on their way through it."""

    reactor: Reactor
    fd: int
    is_broken: bool
    bytes_received: int
    bytes_sent: int
    tls: ssl.SSLObject | None
    def __init__(self, reactor: Reactor, fd: int) -> None: ...
