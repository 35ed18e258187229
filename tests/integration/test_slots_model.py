"""The slots of many hosts, in any order of events, by any clock: never too many.

The real script runs in a real Valkey, and hosts decide by `Slots`' own code. Only the
network is the test's: requests arrive when hypothesis likes, again and too late,
answers are lost; clocks run at different speeds, and Redis loses its memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis as Client

from ogelproxy import keys
from ogelproxy.errors import OgelError, RedisUnavailable
from ogelproxy.redis import Call
from ogelproxy.slots import SCRIPT, Slots
from tests.fixtures.redis import Valkey

ORGANIZATION = "org_model"
KEPT = (keys.connections(ORGANIZATION), keys.EPOCH)
HOSTS = st.integers(0, 2)
#: How fast hosts' clocks run beside Redis's: a tenth apart is allowed.
SPEEDS = (0.95, 1.0, 1.05)

CLOCK = "redis.call('TIME')"
RUN = "string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')"

#: What a broken script does otherwise.
LEARNING = ("local learning = since + keep - now", "local learning = 0")
NUMBERS = ("number <= tonumber(latest)", "false")
OTHERS = ("others = others + tonumber(slots)", "others = 0")
MEMORY = ("math.max(held, used))", "math.max(held, used, mine))")
LENGTH = ("tonumber(ARGV[7])", "tonumber(ARGV[7]) * 0.8")
PROOF = ("math.min(math.max(held, used), firm * mine)", "used")


def modelled(*changes: tuple[str, str]) -> str:
    """The script with the test's clock and run, and changes."""
    text = replaced(SCRIPT.text, CLOCK, "redis.call('HMGET', 'model:clock', 's', 'us')")
    text = replaced(text, RUN, "redis.call('GET', 'model:run')")
    for change in changes:
        text = replaced(text, *change)
    return text


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


class Machine(RuleBasedStateMachine):
    """Three hosts and an organisation that may have a few connections."""

    client: Client  # of the Valkey
    text: str  # of the script
    is_strict = False

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 1_000_000.0  # Redis's clock, in seconds
        self.runs = count(1)
        self.script = self.client.register_script(self.text)
        self.saved: dict[str, dict[str, str]] = {}  # on the disk of Redis
        self.restart_redis(is_empty=True)

    @initialize(maximum=st.integers(1, 4), is_new=st.booleans())
    def begin(self, maximum: int, is_new: bool) -> None:
        if is_new:
            self.client.hset(keys.HOSTS, "new", self.client.get("model:run"))
        self.maximum = maximum
        self.hosts = [Host(self, speed) for speed in SPEEDS]
        self.dead: list[Host] = []  # whose tasks go on to the end
        self.sent: list[Call] = []  # all that ever was, to arrive once more

    def teardown(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.turn()
        self.loop.close()

    def turn(self) -> None:
        """Let hosts go on with what they know."""
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))

    def arrive(self, call: Call) -> Any:
        names, arguments = call
        return self.script(keys=names, args=arguments)

    @rule(which=HOSTS)
    def take(self, which: int) -> None:
        self.hosts[which].take()

    @rule(which=HOSTS)
    def give(self, which: int) -> None:
        if self.hosts[which].open:
            self.hosts[which].give()

    @rule(which=HOSTS)
    def send(self, which: int) -> None:
        self.hosts[which].send()

    @rule(which=HOSTS)
    def receive(self, which: int) -> None:
        self.hosts[which].receive()

    @rule(which=HOSTS)
    def lose_answer(self, which: int) -> None:
        self.hosts[which].lose_answer()

    @rule(which=HOSTS)
    def ask(self, which: int) -> None:
        """Send and receive, as it mostly goes."""
        self.hosts[which].send()
        self.hosts[which].receive()

    @rule(data=st.data())
    @precondition(lambda self: self.sent)
    def arrive_late(self, data: st.DataObject) -> None:
        self.arrive(data.draw(st.sampled_from(self.sent[-8:])))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 8.0, 8.8, 20.0]))
    def wait(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        self.set_clock()
        if self.is_strict:
            # In steps, as a host that runs looks after its leases.
            for step in range(round(seconds / 0.2) + 1):
                self.now = min(before + step * 0.2, before + seconds)
                for host in self.hosts:
                    host.slots._end_unproven()
        self.now = before + seconds

    @rule(which=HOSTS)
    def kill_host(self, which: int) -> None:
        host = self.hosts[which]
        self.hosts[which] = Host(self, host.speed)
        self.dead.append(host)

    @rule()
    def snapshot(self) -> None:
        """Let Redis write to disk what it knows."""
        self.saved = {name: self.client.hgetall(name) for name in KEPT}

    @rule(is_empty=st.booleans())
    def restart_redis(self, is_empty: bool) -> None:
        """Start Redis anew, empty or with what was saved last."""
        self.client.flushall()
        if not is_empty:
            for name, fields in self.saved.items():
                if fields:
                    self.client.hset(name, mapping=fields)
        self.client.set("model:run", f"{next(self.runs):x}")
        self.set_clock()

    def set_clock(self) -> None:
        seconds, rest = divmod(round(self.now * 1e6), 1_000_000)
        self.client.hset("model:clock", mapping={"s": seconds, "us": rest})

    @invariant()
    def never_too_many(self) -> None:
        if not hasattr(self, "hosts"):
            return
        proven = [len(host.open) for host in self.hosts if host.is_proven]
        assert sum(proven) <= self.maximum
        if self.is_strict:
            assert sum(len(host.open) for host in self.hosts) <= self.maximum
        for host in self.hosts:
            host.agrees()


class HealingMachine(Machine):
    """At the end all hosts reach Redis again, and all is as it should be."""

    def teardown(self) -> None:
        try:
            if hasattr(self, "hosts"):
                self.heal()
        finally:
            super().teardown()

    def heal(self) -> None:
        for _ in range(8):
            self.wait(2.0)
            for host in self.hosts:
                host.lose_answer()
                host.send()
                host.receive()
        assert all(host.is_proven or not host.open for host in self.hosts)
        assert sum(len(host.open) for host in self.hosts) <= self.maximum
        known = self.client.hgetall(KEPT[0])
        kept = sorted(int(value.split()[0]) for value in known.values())
        used = sorted(len(host.open) for host in self.hosts if host.open)
        # What nobody asks about is left to its expiry, by a clock that isn't ours.
        assert kept == used or not used


class StrictMachine(HealingMachine):
    is_strict = True


class Host:
    """A host: real `Slots`, whose requests the machine carries."""

    def __init__(self, machine: Machine, speed: float) -> None:
        self.machine = machine
        self.speed = speed
        self.slots: Slots[object] = Slots(
            None,  # type: ignore[arg-type]
            is_strict=machine.is_strict,
            on_lost=self._lose,
            clock=lambda: machine.now * speed,
        )
        self.open: list[object] = []
        self.under_way: tuple[float, Call] | None = None

    def _lose(self, holder: object, error: OgelError) -> None:
        self.open.remove(holder)

    @property
    def is_proven(self) -> bool:
        holding = self.slots._holdings.get(ORGANIZATION)
        return holding is not None and self.slots._clock() < holding.expires_at

    def agrees(self) -> None:
        holding = self.slots._holdings.get(ORGANIZATION)
        assert set(self.open) == set(holding.holders if holding else ())

    def take(self) -> None:
        async def take() -> None:
            holder = object()
            try:
                refused = await self.slots.take(
                    ORGANIZATION, holder, self.machine.maximum, 1
                )
            except RedisUnavailable:
                return
            if refused is None:
                self.open.append(holder)

        self.machine.loop.create_task(take())
        self.machine.turn()

    def give(self) -> None:
        async def give() -> None:
            self.slots.give(ORGANIZATION, self.open.pop(0))

        self.machine.loop.run_until_complete(give())

    def send(self) -> None:
        if self.under_way is None and ORGANIZATION in self.slots._holdings:
            now = self.slots._clock()
            call = self.slots._call(ORGANIZATION, now)
            self.machine.sent.append(call)
            self.under_way = now, call

    def receive(self) -> None:
        if self.under_way is not None:
            now, call = self.under_way
            self.under_way = None
            answer = self.machine.arrive(call)

            async def take_in() -> None:
                self.slots._take_in(ORGANIZATION, now, *answer)

            self.machine.loop.run_until_complete(take_in())
            self.machine.turn()
            self._clean()

    def lose_answer(self) -> None:
        if self.under_way is not None:
            self.under_way = None
            self.slots._fail(ORGANIZATION, RedisUnavailable())
            self.machine.turn()
            self._clean()

    def _clean(self) -> None:
        self.slots._forget_unused([ORGANIZATION])


@pytest.fixture
def client(own_valkey: Valkey) -> Iterator[Client]:
    with Client.from_url(own_valkey.url, decode_responses=True) as client:
        yield client


def search(
    machine: type[Machine],
    client: Client,
    *changes: tuple[str, str],
    phases: Sequence[Phase] = tuple(Phase),
    examples: int = 60,
) -> None:
    text = modelled(*changes)
    searched = type("Searched", (machine,), {"client": client, "text": text})
    run_state_machine_as_test(
        searched,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            phases=phases,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_never_too_many_are_proven_and_all_heals(client: Client) -> None:
    search(HealingMachine, client)


def test_strict_hosts_have_never_too_many(client: Client) -> None:
    search(StrictMachine, client)


def test_search_sees_too_many(client: Client) -> None:
    with pytest.raises(AssertionError):
        search(HealingMachine, client, OTHERS, phases=[Phase.generate], examples=1000)


# What each rule is there for: it happens without the rule, and not with it.


def empty_redis(machine: Machine) -> None:
    machine.take(0)
    machine.ask(0)
    machine.restart_redis(is_empty=True)
    machine.take(1)
    machine.ask(1)


def old_request(machine: Machine) -> None:
    first = None
    for _ in range(machine.maximum):
        machine.take(0)
        machine.ask(0)
        first = first or machine.sent[0]
    assert first is not None
    machine.arrive(first)
    machine.take(1)
    machine.ask(1)


def old_memory(machine: Machine) -> None:
    machine.take(0)
    machine.ask(0)
    machine.snapshot()
    machine.give(0)
    machine.ask(0)
    machine.take(1)
    machine.ask(1)
    machine.restart_redis(is_empty=False)
    machine.take(0)
    machine.ask(0)


def cut_off_host(machine: Machine) -> None:
    machine.take(0)
    machine.ask(0)
    machine.wait(20.0)
    machine.take(1)
    machine.ask(1)
    machine.ask(0)


def almost_a_lease(machine: Machine) -> None:
    machine.take(0)
    machine.ask(0)
    machine.wait(8.0)  # 7.6 by the host's clock
    machine.take(1)
    machine.ask(1)


CASES = [
    (empty_redis, 1, LEARNING),
    (old_request, 2, NUMBERS),
    (old_memory, 1, MEMORY),
    (cut_off_host, 1, PROOF),
    (almost_a_lease, 1, LENGTH),
]


def play(
    client: Client, happen: Callable[[Machine], None], maximum: int, text: str
) -> None:
    played = type("Played", (Machine,), {"client": client, "text": text})
    machine = played()
    try:
        machine.begin(maximum, is_new=True)
        happen(machine)
        machine.never_too_many()
    finally:
        machine.teardown()


@pytest.mark.parametrize(
    ("happen", "maximum", "change"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_each_rule_prevents_what_happens_without_it(
    client: Client,
    happen: Callable[[Machine], None],
    maximum: int,
    change: tuple[str, str],
) -> None:
    play(client, happen, maximum, modelled())
    with pytest.raises(AssertionError):
        play(client, happen, maximum, modelled(change))
