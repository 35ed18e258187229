"""Trial: hosts before a Valkey under load, and what goes wrong meanwhile.

Starts everything, strikes with the faults in their time, and brings home what was
admitted when. What is asked of it and what it proves is `limits`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from bench.case import ROOT
from bench.host import READY, HostReport, HostSpec, TenantSpec, admissions
from bench.judge import worst_excess
from bench.link import Link
from bench.loads import LOADS, Place
from bench.stack import declare_new, kill, through
from ogelproxy.child import LOOPBACK
from ogelproxy.config import Limits, Secret
from ogelproxy.embedded_valkey import EmbeddedValkey

#: Seconds until the hosts, once they run, have settled who uses the floor (`hosts`).
SETTLE = 3.5
#: The share of a limit that needs no Redis, as it is without a setting.
FLOOR: float = Limits().floor
#: Seconds that Valkey is away when it is killed.
AWAY = 0.5
#: Seconds of a slow Redis's delay.
DELAY = 0.2


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens `at` seconds after the begin, and for how long."""

    at: float
    kind: str  # a key of `Scene.faults`
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Trial:
    tenants: Sequence[TenantSpec]
    hosts: int
    seconds: float
    faults: tuple[Fault, ...] = ()
    control: str | None = None
    has_redis: bool = True
    floor: float = FLOOR
    settle: float = SETTLE


@dataclass(frozen=True, slots=True)
class Outcome:
    """By the tenants' order in the trial."""

    begin: float  # by the clock of the times
    admitted: list[list[float]]  # times
    demand: list[int]  # queries that were meant to come
    calls: list[int]  # to Redis, of hosts that reached the end

    def excess(self, trial: Trial, number: int) -> float:
        """Tokens beyond the limit in the worst window."""
        tenant = trial.tenants[number]
        return worst_excess(self.admitted[number], tenant.rate, tenant.capacity)


class Host:
    """One host's process; started again after its death."""

    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it leases. Raises RuntimeError."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.host"),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        # Not by argument: it has a password in it.
        self._process.stdin.write(orjson.dumps(asdict(self._spec)) + b"\n")
        if await self._process.stdout.readline() != READY:
            raise RuntimeError("a host did not start")

    def begin(self, begin: float) -> None:
        """Tell when the trial begins, or began."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(b"%f\n" % begin)

    async def kill(self) -> None:
        """End it without a goodbye, frozen or not, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def report(self) -> HostReport:
        """Wait for its end. Raises RuntimeError when it failed."""
        assert self._process is not None
        output, _ = await self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"a host ended with {self._process.returncode}")
        return HostReport(**orjson.loads(output))


class Scene:
    """Everything that runs in one trial."""

    def __init__(
        self,
        begin: float,
        hosts: Sequence[Host],
        links: Sequence[Link],
        valkey: EmbeddedValkey,
    ) -> None:
        self._begin = begin
        self._hosts = hosts
        self._links = links
        self._valkey = valkey
        self.faults = {
            "kill redis": self._kill_redis,
            "kill host": self._kill_host,
            "freeze host": self._freeze_host,
            "delay redis": self._delay_redis,
            "cut redis": self._cut_redis,
            "cut one host": self._cut_one,
        }

    async def _kill_redis(self, seconds: float) -> None:
        await kill(self._valkey)
        await asyncio.sleep(AWAY)
        self._valkey.launch()

    async def _kill_host(self, seconds: float) -> None:
        await self._hosts[0].kill()
        await self._hosts[0].start()
        self._hosts[0].begin(self._begin)

    async def _freeze_host(self, seconds: float) -> None:
        self._hosts[-1].signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._hosts[-1].signal(signal.SIGCONT)

    async def _delay_redis(self, seconds: float) -> None:
        for link in self._links:
            link.delay = DELAY
        await asyncio.sleep(seconds)
        self._heal()

    async def _cut_redis(self, seconds: float) -> None:
        for link in self._links:
            await link.cut()
        await asyncio.sleep(seconds)
        self._heal()

    async def _cut_one(self, seconds: float) -> None:
        await self._links[0].cut()
        await asyncio.sleep(seconds)
        self._heal()

    def _heal(self) -> None:
        for link in self._links:
            link.heal()


def run(trial: Trial) -> Outcome:
    """Run a trial, in the main thread."""
    with tempfile.TemporaryDirectory() as directory:
        # Whom root's servers run as may walk through it.
        Path(directory).chmod(0o711)
        return asyncio.run(_run(trial, Path(directory)))


async def _run(trial: Trial, directory: Path) -> Outcome:
    async with contextlib.AsyncExitStack() as parts:
        valkey = EmbeddedValkey(
            directory / "valkey", password=Secret(secrets.token_urlsafe(18))
        )
        parts.push_async_callback(valkey.stop)
        await valkey.start()
        await declare_new(valkey)
        links = [
            await parts.enter_async_context(Link((LOOPBACK, valkey.port)))
            for _ in range(trial.hosts)
        ]
        specs = [
            HostSpec(
                tenants=trial.tenants,
                host=number,
                hosts=trial.hosts,
                redis_url=through(valkey.url, link) if trial.has_redis else None,
                seconds=trial.seconds,
                admissions=str(directory / f"host-{number}"),
                control=trial.control,
                floor=trial.floor,
            )
            for number, link in enumerate(links)
        ]
        hosts = [Host(spec) for spec in specs]
        for host in hosts:
            parts.push_async_callback(host.kill)
            await host.start()
        begin = time.monotonic() + trial.settle
        for host in hosts:
            host.begin(begin)
        scene = Scene(begin, hosts, links, valkey)
        for fault in trial.faults:
            await asyncio.sleep(begin + fault.at - time.monotonic())
            await scene.faults[fault.kind](fault.seconds)
        reports = [await host.report() for host in hosts]
        return _outcome(trial, begin, specs, reports)


def _outcome(
    trial: Trial, begin: float, specs: Sequence[HostSpec], reports: Sequence[HostReport]
) -> Outcome:
    admitted: list[list[float]] = [[] for _ in trial.tenants]
    for spec in specs:
        for moment, number in admissions(Path(spec.admissions)):
            admitted[number].append(moment)
    demand, calls = [], []
    for tenant in trial.tenants:
        places = [
            Place(tenant.rate, tenant.capacity, number, trial.hosts, trial.seconds)
            for number in range(trial.hosts)
        ]
        arrivals = [LOADS[tenant.load](place) for place in places]
        demand.append(sum(count for each in arrivals for _, count in each))
        calls.append(sum(report.calls.get(tenant.handle, 0) for report in reports))
    return Outcome(begin, admitted, demand, calls)
