from ogelproxy._loan import Lendable

class ServerCore(Lendable):
    """One server connection in the steady state."""

    def lose(self) -> int:
        """Treat the server as gone: it is, or broke the protocol."""
