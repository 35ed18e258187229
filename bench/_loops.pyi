from ogelproxy._bucket import TokenBucket
from ogelproxy._client import ClientCore
from ogelproxy._connection import Connection
from ogelproxy._server import ServerCore

class Loop:
    """Something to do again and again, in C: ``loop(1000)``."""

    def __call__(self, count: int) -> None: ...
    def instructions(self, count: int) -> None:
        """Have callgrind write how many instructions `count` and twice it take.

        Two parts of its file, `once` and `twice`; their difference is of `count`.
        Raises RuntimeError where nobody counts.
        """

class Nothing(Loop):
    """A call of a method: what any loop below costs at the least."""

class Scans(Loop):
    """A scan of one text, as of a whole query."""

    def __init__(self, text: bytes) -> None: ...
    @property
    def fingerprint(self) -> int:
        """Of the text, once it was scanned."""

class Takes(Loop):
    """A token taken of a bucket, or not, `step` seconds after the one before."""

    bucket: TokenBucket

    def __init__(self, bucket: TokenBucket, now: float, step: float) -> None: ...

class QuietClient(ClientCore):
    """A client whose requests are cut and told apart, and go no further."""

    def meet(self, server: QuietServer) -> None:
        """Borrow a server for ever."""

class QuietServer(ServerCore):
    """A server whose answers are sent to nobody."""

    is_counting: bool

class Requests(Loop):
    """One read's bytes of a client."""

    def __init__(self, client: QuietClient, data: bytes) -> None: ...

class Answers(Loop):
    """One read's bytes of a server that was asked for `asked`, ASKED_ each."""

    def __init__(self, server: QuietServer, data: bytes, asked: bytes) -> None: ...

class Pays(Loop):
    """A client's token for a query, and the clock for it."""

    def __init__(self, client: QuietClient) -> None: ...

class Counts(Loop):
    """A finished query counted for usage and metrics, of so many fingerprints."""

    def __init__(self, server: QuietServer, fingerprints: int) -> None: ...

class Queries(Loop):
    """Whole queries from a socket's far end to another's, and back.

    Raises ValueError for what is longer than 4,096 bytes, and RuntimeError from the
    loop when anything but `passed` and `answer` comes out.
    """

    def __init__(
        self,
        client: Connection,
        client_end: int,
        server: Connection,
        server_end: int,
        request: bytes,
        passed: bytes,
        answer: bytes,
    ) -> None: ...
