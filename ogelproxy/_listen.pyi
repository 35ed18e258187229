from ogelproxy._views import ViewClient

class ListenClient(ViewClient):
    """A client that may LISTEN over a connection that others share.

    Its pool's `channels` is a `listen.Channels`.
    """

    has_listened: bool
    waits_to_listen: bool
    is_listening: bool
    told_later_bytes: int
    @property
    def encoding(self) -> str | None:
        """The client_encoding that it asked for when it connected, if any."""
    def notify(self, message: bytes, most: int, most_bytes: int) -> bool:
        """Write a NotificationResponse, or keep it while the client can't be told.

        False, and nothing is done, when `most` messages or `most_bytes` would be
        kept.
        """
    def tell(self) -> None:
        """Write the notifications that were kept, as many as may be now."""
    @property
    def told_later_count(self) -> int:
        """How many notifications are kept for it."""
