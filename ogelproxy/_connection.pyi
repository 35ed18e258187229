import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator

from ogelproxy._reactor import Descriptor

class More:
    """Until there is more: what a stepped coroutine waits for."""

    def __await__(self) -> Iterator[More]: ...

MORE: More

class Connection(Descriptor):
    """A descriptor whose messages coroutines take and send."""

    #: Resumes the coroutine that waits for more, if no task does.
    stepper: Callable[[], None] | None
    @property
    def is_closed(self) -> bool:
        """Whether the descriptor is closed."""
    @property
    def unsent(self) -> int:
        """Bytes that the kernel did not take yet."""
    def more(self) -> Awaitable[object]:
        """Return what is done once there is more to take.

        It raises ConnectionResetError when the peer is gone. With a `stepper` that
        is MORE, and the stepper is called.
        """
    def peek(self) -> bytes:
        """Return the bytes that were read and not taken."""
    def take(self, size: int) -> bytes | None:
        """Take exactly `size` bytes, or None while there are fewer."""
    def take_message(self, limit: int) -> tuple[bytes, bytes] | None:
        """Take one message as (type, body), or None while it isn't whole.

        Raises ProtocolViolation when its length is below 4 or above `limit`.
        """
    def send(self, data: bytes) -> None:
        """Send `data`, keeping what the kernel doesn't take."""
    def drained(self) -> asyncio.Future[None]:
        """Return a future that is done once all is sent, or the peer is gone."""
    def end_output(self) -> None:
        """Tell the peer that nothing more will come."""
    def close(self) -> None:
        """Close the descriptor; unsent bytes are lost."""
    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        """Put TLS between this connection and its peer.

        Raises ssl.SSLError, or ConnectionResetError when the peer is gone.
        """
