from ogelproxy._simple import SimpleClient

class NamingClient(SimpleClient):
    """A client whose names of prepared statements are its own."""

    def name_of(self, server_name: bytes) -> bytes | None:
        """The client's name of the statement that servers know by this one."""
