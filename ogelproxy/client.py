"""Client: one program connected to us, and the Session it logged in to.

The compiled `ListenClient` owns socket, buffers and flow control; here is what a
login adds. How the login goes is `login`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from ogelproxy import sessions
from ogelproxy._listen import ListenClient

if TYPE_CHECKING:
    from ogelproxy._usage import Attribution
    from ogelproxy.gate import Admission

#: Largest message of a client that is still logging in (a token fits).
MAX_LOGIN_MESSAGE = 20_000


@dataclass(slots=True)
class Session:
    """Who a logged-in client is; never changed after its login."""

    handle: str
    key_id: UUID | None  # None when a token was used
    database: str
    target_id: UUID
    application_name: str
    address: str
    protocol: str  # major and minor version that is spoken
    attribution: Attribution
    admission: Admission  # at the gate
    connected_at: datetime
    is_replication: bool
    process_id: int  # the cancel key that we gave it
    secret: bytes = field(repr=False)


class Client(ListenClient):
    """A client connection, from accept to close."""

    address: str = ""  # where it comes from; what a load balancer says, if it may
    port: int = 0  # at the address that connected to us
    is_forwarded: bool = False  # a load balancer speaks for it

    pinned_at: datetime | None = None  # when it last came to keep its server

    @property
    def pins(self) -> tuple[str, ...]:
        """Why it keeps its server connection, in words."""
        return sessions.reasons(self.held_by)

    async def receive_message(self) -> tuple[bytes, bytes]:
        """Wait for one message; only while a coroutine owns the client."""
        while (taken := self.take_message(MAX_LOGIN_MESSAGE)) is None:
            await self.more()
        return taken

    async def receive_exactly(self, size: int) -> bytes:
        """Wait for `size` bytes; only while a coroutine owns the client."""
        while (taken := self.take(size)) is None:
            await self.more()
        return taken
