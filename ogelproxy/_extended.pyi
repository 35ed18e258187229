from ogelproxy._simple import SimpleClient

class ExtendedClient(SimpleClient):
    """A client with the extended protocol: batches, statements, portals."""
