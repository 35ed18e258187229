"""Knocking: visitors that come, ask and leave, as programs without a pool do.

Of two kinds: `come_and_go` as fast as the other side lets them, which shows what a
login costs, and `come_on_time` at a fixed rate whether or not the ones before were
let in, which shows how long one waits.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from bench.visitor import Door, Visitor

QUERY = "SELECT 1"
#: Visitors on their way at once in `come_and_go`, each in a process of its own: one
#: that looks up, hashes and unpacks would keep the others from it.
VISITORS = 4
#: Threads that open the door in `come_on_time`: a second's visitors at 200 a second,
#: beyond which the next ones come late, and are counted as late.
THREADS = 200


def processes() -> ProcessPoolExecutor:
    """Return the processes that `come_and_go` works in; `with` ends them."""
    return ProcessPoolExecutor(VISITORS, get_context("spawn"))


@dataclass(frozen=True, slots=True)
class Manner:
    """How visitors of `come_and_go` come."""

    url: str
    #: PEM file with the authority that a server's TLS is known by; None without TLS.
    authority: str | None = None
    #: Whether TLS takes up the session of the visitor before.
    resumes: bool = False


def come_and_go(
    pool: ProcessPoolExecutor, manner: Manner, seconds: float
) -> tuple[int, int]:
    """Let visitors log in, ask and leave for `seconds`.

    Return how many did, and how many TLS sessions were resumed by them. Raises what a
    visitor raises.
    """
    each = [pool.submit(_come_and_go, manner, seconds) for _ in range(VISITORS)]
    counts = [future.result() for future in each]
    return sum(count for count, _ in counts), sum(resumed for _, resumed in counts)


def _come_and_go(manner: Manner, seconds: float) -> tuple[int, int]:
    tls = None
    if manner.authority is not None:
        tls = ssl.create_default_context(cafile=manner.authority)
    door = Door.of(manner.url, tls)
    count = resumed = 0
    session = None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        visitor = Visitor(door).enter(session)
        visitor.ask(QUERY)
        if manner.resumes:
            session = visitor.session
        visitor.leave()
        count += 1
        resumed += visitor.has_resumed
    return count, resumed


@dataclass(slots=True)
class Arrivals:
    """What became of visitors that came on time."""

    #: Seconds from when each was due until it could ask, sorted.
    waits: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """Return the least wait that so many percent don't exceed, in seconds."""
        return self.waits[max(0, -int(-percent * len(self.waits) // 100) - 1)]


def come_on_time(doors: Sequence[Door], *, rate: float, seconds: float) -> Arrivals:
    """Let visitors come at `rate` per second, by turns at each of the doors."""
    found = Arrivals()
    count = round(rate * seconds)
    numbers = iter(range(count))
    lock = threading.Lock()
    begin = time.monotonic() + 0.05

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            due = begin + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            visitor = Visitor(doors[number % len(doors)])
            try:
                visitor.enter()
                wait = time.monotonic() - due
                visitor.leave()
            except Exception as failure:
                with lock:
                    found.failures.append(f"{type(failure).__name__}: {failure}")
                continue
            with lock:
                found.waits.append(wait)

    threads = [threading.Thread(target=work) for _ in range(min(THREADS, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.waits.sort()
    return found
