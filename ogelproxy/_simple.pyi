from ogelproxy._client import ClientCore

class SimpleClient(ClientCore):
    """A client with the simple protocol: query strings and function calls."""
