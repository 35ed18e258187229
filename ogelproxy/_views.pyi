from typing import Any

from ogelproxy._extended import ExtendedClient

class ViewClient(ExtendedClient):
    """A client that may ask about itself, `SHOW o7s.…`, and no server for it.

    Its `host` makes what answers: ``host.views()`` returns an object with
    ``takes(kind, body)``, whether a message is about a view;
    ``answer(client, kind, body)``, the messages that answer it, or one
    ErrorResponse, or None when it will call the client's ``carry_on``; and
    ``__len__``, 0 once nothing of it is prepared.
    """

    views: Any
    @property
    def prepared_count(self) -> int:
        """How many named statements it has prepared."""
    def carry_on(self) -> None:
        """Handle again the message that ``answer`` had no answer to yet."""
