from ogelproxy._loan import Lendable

class ServerCore(Lendable):
    """One server connection in the steady state."""

    @property
    def prepared_count(self) -> int:
        """How many shared statements it has prepared."""
    def lose(self) -> int:
        """Treat the server as gone: it is, or broke the protocol."""
