from ogelproxy._connection import Connection

class Flying(Connection):
    """A connection that may have work at a server."""

    flights: Flights
    is_flying: bool

class Flights:
    """The clients of one organisation, in one process, with work at servers."""

    count: int
    most: int
    version: int
    def __new__(cls) -> Flights: ...
    @property
    def waiting_count(self) -> int:
        """How many clients wait to be counted."""
    def shape(self, most: int, version: int) -> None:
        """Let `most` be counted at once, 0 for any number, as of a tenant's version."""
    def admit(self) -> None:
        """Count those who wait, as many as may be."""
