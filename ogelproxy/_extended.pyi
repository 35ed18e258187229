from ogelproxy._client import ClientCore

class ExtendedClient(ClientCore):
    """A client with the extended protocol: batches, statements, portals."""
