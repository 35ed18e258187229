from ogelproxy._naming import NamingClient

class ExtendedClient(NamingClient):
    """A client with the extended protocol: batches, statements, portals."""
