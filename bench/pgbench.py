"""Pgbench: Postgres's own load generator, in a process of its own.

It is run by `run`, which also says what CPU time some processes took meanwhile: from
the end of the first second in which clients were busy to the end.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ogelproxy.embedded import find_binaries

#: Clients that one of its threads serves.
CLIENTS_PER_THREAD = 64
#: Seconds beyond its time that it may take, for a thousand logins too.
SPARE_SECONDS = 60.0
#: Of the highest rate: a second with less is one in which clients still came.
LATE = 0.1
PROGRESS = re.compile(rb"progress: ([\d.]+) s, ([\d.]+) tps")
FAILED = re.compile(r"number of failed transactions: (\d+)")


class PgbenchFailed(Exception):
    """It ended with an error; its last words."""


@dataclass(slots=True)
class Outcome:
    """What a run gave, without its first busy second."""

    transactions: float
    seconds: float
    cpu_seconds: float  # of the processes that were watched
    failed: int  # transactions, of the whole run
    #: Milliseconds of each transaction, sorted; where asked for.
    latencies: array.array[float] = field(default_factory=lambda: array.array("d"))

    @property
    def rate(self) -> float:
        """Transactions per second."""
        return self.transactions / self.seconds

    @property
    def cpu_microseconds(self) -> float:
        """CPU time per transaction."""
        return self.cpu_seconds / self.transactions * 1e6

    def percentile(self, percent: float) -> float:
        """Return a latency in milliseconds: the least that so many don't exceed."""
        count = len(self.latencies)
        return self.latencies[max(0, -int(-percent * count // 100) - 1)]

    def typical(self) -> float:
        """Return the mean latency in milliseconds, without the slowest tenth."""
        count = max(1, len(self.latencies) * 9 // 10)
        return sum(self.latencies[:count]) / count


def find() -> str:
    """Return pgbench's path. Raises PgbenchFailed."""
    path = shutil.which("pgbench", path=str(find_binaries(os.environ))) or shutil.which(
        "pgbench"
    )
    if path is None:
        raise PgbenchFailed("there is no pgbench beside postgres, nor on PATH")
    return path


async def prepare(url: str) -> None:
    """Make pgbench's tables, of 100,000 accounts."""
    await _finish(await _launch(url, "-i", "-q"), SPARE_SECONDS)


async def run(
    url: str,
    *,
    protocol: str,
    clients: int,
    seconds: int,
    rate: float | None = None,
    has_latencies: bool = False,
    reconnects: bool = False,
    cpu: Callable[[], float] = lambda: 0.0,
) -> Outcome:
    """Let `clients` read accounts for `seconds`, at least 3; at `rate` per second.

    One that `reconnects` has a new connection for each transaction. `cpu` says what CPU
    seconds have been used. Raises PgbenchFailed and TimeoutError.
    """
    with tempfile.TemporaryDirectory() as directory:
        options = [
            *("-n", "-S", "-M", protocol, "-c", str(clients), "-T", str(seconds)),
            *("-j", str(-(-clients // CLIENTS_PER_THREAD))),
            *("-P", "1", "--progress-timestamp"),
            *(("-R", str(rate)) if rate else ()),
            *(("-C",) if reconnects else ()),
            *(("-l", "--log-prefix", f"{directory}/log") if has_latencies else ()),
        ]
        process = await _launch(url, *options)
        marks: list[tuple[float, float, float]] = []
        words: list[bytes] = []
        assert process.stderr is not None
        async with asyncio.timeout(seconds + SPARE_SECONDS):
            async for line in process.stderr:
                found = PROGRESS.match(line)
                if found:
                    marks.append((float(found[1]), float(found[2]), cpu()))
                else:
                    words.append(line)
        output = await _finish(process, SPARE_SECONDS, words)
        # A thousand clients are seconds late: their logins are a part of the time.
        highest = max((rate for _, rate, _ in marks), default=0.0)
        while marks and marks[0][1] < LATE * highest:
            marks.pop(0)
        if len(marks) < 2:
            raise PgbenchFailed(f"only {len(marks)} s were seen")
        between = list(itertools.pairwise(marks))
        failed = FAILED.search(output)
        return Outcome(
            transactions=sum((now[0] - then[0]) * now[1] for then, now in between),
            seconds=marks[-1][0] - marks[0][0],
            cpu_seconds=marks[-1][2] - marks[0][2],
            failed=int(failed[1]) if failed else 0,
            latencies=_latencies(
                Path(directory), since=marks[0][0], is_lagging=rate is not None
            ),
        )


async def _launch(url: str, *options: str) -> asyncio.subprocess.Process:
    parts = urlsplit(url)
    host = parts.hostname or parse_qs(parts.query)["host"][0]
    port = parts.port or parse_qs(parts.query)["port"][0]
    clean = {name: v for name, v in os.environ.items() if not name.startswith("PG")}
    return await asyncio.create_subprocess_exec(
        *(find(), *options, "-h", host, "-p", str(port)),
        *("-U", unquote(parts.username or ""), parts.path.removeprefix("/")),
        env=clean
        | {"PGPASSWORD": unquote(parts.password or ""), "PGSSLMODE": "disable"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # as the proxies: see Stack
    )


async def _finish(
    process: asyncio.subprocess.Process, seconds: float, words: Sequence[bytes] = ()
) -> str:
    try:
        async with asyncio.timeout(seconds):
            output, last = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = b"".join(words) + last
        raise PgbenchFailed(said.decode(errors="replace")[-500:].strip())
    return output.decode()


def _latencies(
    directory: Path, *, since: float, is_lagging: bool
) -> array.array[float]:
    """Read logs of transactions (manual, pgbench, "Per-Transaction Logging").

    The third column has microseconds, the fifth and sixth when it ended, and with a
    rate the seventh has those in which it waited for its turn.
    """
    found = array.array("d")
    for path in directory.iterdir():
        with path.open() as log:
            for line in log:
                columns = line.split()
                if float(columns[4]) + float(columns[5]) / 1e6 < since:
                    continue
                lag = float(columns[6]) if is_lagging else 0.0
                found.append((float(columns[2]) - lag) / 1e3)
    return array.array("d", sorted(found))
