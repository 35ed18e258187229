"""A server's bytes, and what clients and servers do meanwhile, in any order.

An input is a byte of choices and steps, parted by `STEP`: a letter that says who
does what, and its bytes. Whatever a server says, clients get messages, and
every server ends up settled in its pool or closed.
"""

from __future__ import annotations

from ogelproxy._wire import split
from ogelproxy.errors import PoolTimeout
from ogelproxy.protocol import messages
from ogelproxy.protocol.messages import message
from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fuzz.client import FLUSH, NAMED, SYNC, bind, execute, parse, query
from tests.fuzz.postgres import Session
from tests.fuzz.rig import Backend, Rig
from tests.fuzz.targets import Target

STEP = b"\xfe\xfe"
MAX_STEPS = 40
MODES = list(PoolMode)
LIMITS = [LimiterMode.OFF, LimiterMode.ENFORCE, LimiterMode.WARN]


class Fuzzed:
    """A server that checks what it gets, and answers only when told to."""

    is_closed = False  # when a step says so

    def __init__(self) -> None:
        self.session = Session(is_strict=True)
        self.owed = b""

    def feed(self, data: bytes) -> bytes:
        self.owed += self.session.feed(data)
        return b""


class Course:
    """One input, step by step."""

    def __init__(self, choices: int) -> None:
        self.servers: list[Fuzzed] = []
        self.rig = Rig(
            MODES[choices & 3],
            self._make_answerer,
            max_servers=1 + (choices >> 2 & 1),
            max_prepared=1 + (choices >> 3 & 1),
            max_prepared_bytes=800,
            limiter_mode=LIMITS[(choices >> 4 & 3) % 3],
            max_wait=1e12 if choices & 64 else 0.0,
            max_in_flight=choices >> 7,
        )
        self.peers = [self.rig.connect(), self.rig.connect()]

    def _make_answerer(self) -> Fuzzed:
        server = Fuzzed()
        self.servers.append(server)
        return server

    def backend(self, at: int) -> Backend | None:
        """The latest server connection, or the one before it."""
        backends = self.rig.backends
        return backends[-1 - at] if at < len(backends) else None

    def step(self, letter: bytes, data: bytes) -> None:
        which = letter.isupper()
        peer = self.peers[which]
        backend = self.backend(which)
        client = self.rig.clients[which][1]
        match letter.lower():
            case b"c":
                peer.send(data)
            case b"s" if backend is not None:
                backend.send(data)
            case b"a":
                # As Postgres would, to all that was asked so far.
                for server, each in zip(self.servers, self.rig.backends, strict=True):
                    each.send(server.owed)
                    server.owed = b""
                    if server.session.is_closed:
                        each.close()
            case b"x":
                peer.close()
            case b"k" if backend is not None:
                backend.close()
            case b"r":
                peer.is_reading = not peer.is_reading
            case b"t":
                self.rig.bucket.refund(1)
                self.rig.loop.run_timers()
            case b"g":
                client.give_up(messages.error_response(PoolTimeout(1.0)))
            case b"f":
                client.fail(messages.error_response(PoolTimeout(1.0)))
            case b"o" if backend is not None and data:
                self.cancel(backend, data)
            case b"e":
                self.rig.pool.retire_all()
        self.rig.settle()

    def cancel(self, backend: Backend, data: bytes) -> None:
        """A cancel request to a busy server begins, or the last one ends."""
        server = backend.server
        if data[0] & 1:
            server.cancels += server.owed > 0
        elif server.cancels:
            server.cancel_done()

    def end(self) -> None:
        for backend in self.rig.backends:
            while backend.server.cancels:
                backend.server.cancel_done()
        for peer in self.peers:
            peer.is_reading = True
        self.rig.settle()
        for peer in self.peers:
            split(bytes(peer.received))  # raises where a length can't be
            peer.close()
        self.rig.settle()
        idle = self.rig.pool.idle_servers
        for backend in self.rig.backends:
            server = backend.server
            # Nobody's, it is in the pool, or has still to answer its reset.
            assert server.client is None
            if not server.is_closed and server not in idle:
                assert server.owed
                backend.close()
        self.rig.close()


def run(data: bytes) -> None:
    course = Course(data[0] if data else 0)
    said = len(data)
    for step in data[1:].split(STEP)[:MAX_STEPS]:
        if step:
            course.step(step[:1], step[1:])
    rig = course.rig
    asked = sum(backend.server.bytes_received for backend in rig.backends)
    bound = (said + asked + 1000) * 40
    for peer, client in rig.clients:
        assert client.bytes_sent <= bound
        assert client.unsent == 0 or not peer.is_reading or peer.is_ended
    for backend in rig.backends:
        assert len(backend.received) <= bound
    course.end()


READY, READY_T = message(b"Z", b"I"), message(b"Z", b"T")
ROWS = message(b"T", bytes(2)) + message(b"D", b"\0\1\0\0\0\1x") * 2
DONE = message(b"C", b"SELECT 2\0")
ERROR = message(b"E", b"SERROR\0VERROR\0C22012\0Mno\0\0")
FATAL = message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mend\0\0")
STALE = message(b"E", b"SERROR\0VERROR\0C0A000\0Mno\0RRevalidateCachedQuery\0\0")
NOTICE = message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mhm\0\0")
NOTIFICATION = message(b"A", b"\0\0\0\7channel\0text\0")
ANSWER = message(b"D", b"\0\1\0\0\0\x0262") + message(b"C", b"SELECT 1\0")
STATUS = messages.parameter_status("application_name", "b")
COURSES = (
    (b"c" + query(b"select 1"), b"s" + ROWS + DONE + READY),
    (b"c" + NAMED + SYNC, b"s" + message(b"1", b""), b"C" + NAMED + SYNC, b"a"),
    (b"c" + query(b"begin"), b"C" + query(b"select"), b"a", b"g", b"c" + SYNC, b"a"),
    (b"c" + query(b"a"), b"s" + NOTICE + STATUS + NOTIFICATION + ERROR + READY_T, b"x"),
    (b"c" + parse(b"select 1", b"s") + FLUSH, b"s" + STALE, b"c" + SYNC, b"a", b"k"),
    (b"c" + query(b"copy"), b"a", b"c" + message(b"d", b"1\n"), b"C" + query(b"a"),
     b"c" + message(b"c", b""), b"a", b"a"),
    (b"c" + query(b"a") * 6, b"t", b"a", b"t", b"C" + NAMED + SYNC, b"t", b"a"),
    (b"c" + query(b"a"), b"s" + ROWS[:-3], b"x", b"s" + FATAL, b"k"),
    (b"c" + query(b"reset all"), b"s" + message(b"C", b"RESET\0") + READY, b"a"),
    (b"c" + query(b"set a = b"), b"a", b"C" + query(b"set a = c"), b"a", b"c"
     + query(b"reset a"), b"s" + message(b"C", b"RESET\0") + READY, b"x", b"a"),
    (b"c" + query(b"set a = b"), b"a", b"s" + ANSWER + READY, b"C" + query(b"a"), b"a"),
    (b"c" + query(b"discard all"), b"s" + message(b"C", b"DISCARD ALL\0") + READY),
    (b"c" + query(b"a"), b"o\1", b"a", b"C" + query(b"b"), b"o\0", b"a", b"e"),
    (b"c" + bind(b"s") + execute() + SYNC, b"r", b"a", b"f", b"r", b"C" + NAMED,
     b"C" + SYNC + message(b"X", b""), b"a"),
    (b"c" + message(b"F", bytes(10)), b"s" + message(b"V", bytes(4)) + READY,
     b"s" + messages.parameter_status("client_encoding", "SJIS")),
    # The last bytes of a message come with what can't be one.
    (b"c" + query(b"listen a"), b"a", b"cd\0\0\0\x0a123", b"c456" + b"\xff" * 5, b"a",
     b"C" + query(b"b"), b"a"),
)  # fmt: skip
SEEDS = tuple(
    bytes([number * 37 & 255]) + STEP.join(course)
    for number, course in enumerate(COURSES * 2)
)
WORDS = (
    *(STEP, STEP + b"a", STEP + b"c" + query(b"a"), STEP + b"C" + NAMED + SYNC),
    *(STEP + b"s", STEP + b"x", STEP + b"k", STEP + b"t", STEP + b"r", STEP + b"g"),
    *(
        READY,
        READY_T,
        ROWS,
        DONE,
        ANSWER,
        ERROR,
        FATAL,
        STALE,
        NOTICE,
        STATUS,
        NOTIFICATION,
    ),
    *(message(b"1", b""), message(b"2", b""), message(b"3", b""), message(b"I", b"")),
    *(message(b"n", b""), message(b"s", b""), message(b"G", bytes(3)), b"DISCARD ALL"),
    *(message(b"W", bytes(3)), message(b"Z", b"E"), b"RESET\0", b"DEALLOCATE ALL\0"),
)
TARGETS = (Target("server", run, SEEDS, WORDS, max_bytes=700),)
