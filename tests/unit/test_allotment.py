"""Server connections of one address, shared out: the arithmetic, and simulations.

A simulated organisation has clients that send a transaction, wait for its end and
perhaps think; a login and the end of a session take their time. The clock is the
simulation's own, so that a minute of load takes a moment. What is asked for: the bound
holds at every moment, each gets the share that it is due, nobody waits for long, and
few connections are moved for it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.allotment import (
    RECENT,
    TENURE,
    Allotment,
    Sharing,
    share_out,
)

LOGIN = 0.010
PARTING = 0.001


class Cancelled:
    """An event that is yet to happen, or was called off."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        self.act = None


class World:
    """The clock, and what will happen."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._events: list[tuple[float, int, Cancelled]] = []
        self._numbers = itertools.count()

    def later(self, delay: float, act: Callable[[], None]) -> Cancelled:
        event = Cancelled(act)
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), event))
        return event

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heapq.heappop(self._events)
            if event.act is not None:
                event.act()
        self.now = end


@dataclass(eq=False)
class SimulatedServer:
    opened_at: float
    idle_since: float


@dataclass(eq=False)
class SimulatedPool:
    """A pool with its clients; `busy` is how long a transaction takes."""

    world: World
    allotment: Allotment
    handle: str
    weight: int = 1
    busy: float = 0.005
    think: float = 0.0
    max_servers: int = 1000
    size: int = 0
    opening: int = 0
    surplus: int = 0
    tenure: float = 0.0
    is_failing: bool = False
    clients: int = 0
    idle: list[SimulatedServer] = field(default_factory=list)
    waiting: deque[float] = field(default_factory=deque)  # since when
    #: Seconds that each transaction waited for a server.
    waits: list[float] = field(default_factory=list)
    served: float = 0.0  # seconds times servers
    logins: int = 0

    def __post_init__(self) -> None:
        self.allotment.join(self)

    # What an allotment asks.

    def lack(self) -> int:
        return min(len(self.waiting), self.max_servers - self.size) - self.opening

    def demand(self, now: float) -> int:
        used = self.size - sum(now - each.idle_since > RECENT for each in self.idle)
        return max(used, used + self.opening + self.lack())

    def open_one(self) -> None:
        self.opening += 1
        self.allotment.take()
        self.logins += 1
        self.world.later(LOGIN, self._opened)

    def close_idle(self, now: float) -> bool:
        for server in self.idle:
            if now - server.opened_at >= self.tenure:
                self.idle.remove(server)
                self._close(server)
                return True
        return False

    # Its servers.

    def _opened(self) -> None:
        self.opening -= 1
        if self.is_failing:
            self.allotment.failed(self)
            return
        self.size += 1
        self._settle(SimulatedServer(self.world.now, self.world.now))

    def _close(self, server: SimulatedServer) -> None:
        self.size -= 1
        self.served += self.world.now - server.opened_at
        self.allotment.part()
        self.world.later(PARTING, self.allotment.parted)

    def _settle(self, server: SimulatedServer) -> None:
        server.idle_since = self.world.now
        if self.surplus and self.world.now - server.opened_at >= self.tenure:
            self.surplus -= 1
            self._close(server)
        elif self.waiting:
            self._work(server, self.waiting.popleft())
        else:
            self.idle.append(server)
        self._ask()

    def _work(self, server: SimulatedServer, since: float) -> None:
        self.waits.append(self.world.now - since)

        def done() -> None:
            if self.clients:
                self.world.later(self.think, self.send)
            self._settle(server)

        # Not all alike, or the simulation would march in step.
        self.world.later(self.busy * self.world.random.uniform(0.5, 1.5), done)

    # Its clients.

    def start(self, clients: int) -> None:
        self.clients = clients
        for _ in range(clients):
            self.send()

    def stop(self) -> None:
        """Its clients leave at the end of their transactions."""
        self.clients = 0
        self.waiting.clear()

    def send(self) -> None:
        if not self.clients:
            return
        if self.idle:
            self._work(self.idle.pop(), self.world.now)
        else:
            self.waiting.append(self.world.now)
            self._ask()

    def _ask(self) -> None:
        if self.lack() > 0:
            self.allotment.ask(self)


class Address:
    """An allotment, its pools, and what was seen of them."""

    def __init__(self, max_servers: int) -> None:
        self.world = World()
        self.max_servers = max_servers
        self.allotment = Allotment(
            max_servers, lambda: self.world.now, self.world.later
        )
        self.pools: list[SimulatedPool] = []
        self.held: dict[SimulatedPool, float] = {}

    def pool(self, handle: str, **options: object) -> SimulatedPool:
        pool = SimulatedPool(self.world, self.allotment, handle, **options)  # type: ignore[arg-type]
        self.pools.append(pool)
        return pool

    def run(self, seconds: float) -> dict[str, float]:
        """Let time go by; return how many servers each organisation had on average."""
        steps = round(seconds / 0.001)
        held = dict.fromkeys((pool.handle for pool in self.pools), 0)
        for _ in range(steps):
            self.world.run(0.001)
            assert self.allotment.taken <= max(self.max_servers, 0)
            for pool in self.pools:
                held[pool.handle] += pool.size
        return {handle: total / steps for handle, total in held.items()}

    @property
    def logins(self) -> int:
        return sum(pool.logins for pool in self.pools)


# The arithmetic.


@pytest.mark.parametrize(
    ("capacity", "weights", "demands", "dues"),
    [
        (10, [1, 1], [3, 4], [3, 4]),  # enough for all
        (10, [1, 1], [20, 20], [5, 5]),
        (10, [1, 4], [20, 20], [2, 8]),
        (10, [1, 40], [1, 40], [1, 9]),  # the guaranteed one
        (10, [1, 1, 2], [1, 20, 20], [1, 3, 6]),  # what one leaves goes to others
        (2, [1, 1, 2], [5, 5, 5], [0.5, 0.5, 1]),  # not even one for each
        (10, [1, 1], [0, 20], [0, 10]),
        (3, [1, 1, 1], [9, 9, 9], [1, 1, 1]),
        (5, [], [], []),
    ],
)
def test_shares_are_due_by_weight_and_demand(
    capacity: int, weights: list[float], demands: list[float], dues: list[float]
) -> None:
    assert share_out(capacity, weights, demands) == pytest.approx(dues)


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 300)), max_size=40),
)
def test_all_is_shared_out_and_nobody_is_due_more_than_it_demands(
    capacity: int, askers: list[tuple[int, int]]
) -> None:
    weights = [weight for weight, _ in askers]
    demands = [demand for _, demand in askers]
    dues = share_out(capacity, weights, demands)
    assert sum(dues) == pytest.approx(min(capacity, sum(demands)))
    fits = sum(demand > 0 for demand in demands) <= capacity
    levels = []
    for due, weight, demand in zip(dues, weights, demands, strict=True):
        assert 0 <= due <= demand
        assert not fits or due >= min(demand, 1)
        if due < demand - 1e-9 and due > (1 if fits else 0) + 1e-9:
            levels.append(due / weight)
    # Who gets neither its all nor only the guaranteed one gets it by weight alone.
    assert not levels or max(levels) == pytest.approx(min(levels))


# Simulations.


def test_one_client_among_many_hardly_waits() -> None:
    address = Address(10)
    noisy = address.pool("org_noisy", weight=40)
    quiet = address.pool("org_quiet", busy=0.002, think=0.05)
    noisy.start(40)
    assert address.run(2)["org_noisy"] > 9.9
    quiet.start(1)
    address.run(0.1)
    logins = address.logins
    held = address.run(20)
    # Its first transaction waits for one of theirs to end and for a login.
    assert quiet.waits[0] < 0.05
    assert max(quiet.waits[1:]) == 0
    assert held["org_quiet"] == 1
    assert held["org_noisy"] == 9
    assert address.logins == logins, "places went back and forth"


@pytest.mark.parametrize("busy", [0.002, 0.1])
def test_shares_follow_the_weights(busy: float) -> None:
    address = Address(20)
    weights = {"org_a": 1, "org_b": 2, "org_c": 10, "org_d": 40}
    for handle, weight in weights.items():
        address.pool(handle, weight=weight, busy=busy).start(60)
    address.run(5)
    logins = address.logins
    held = address.run(60)
    due = share_out(20, list(weights.values()), [60] * 4)
    for handle, servers in zip(weights, due, strict=True):
        assert held[handle] == pytest.approx(servers, rel=0.1)
    # A place that moves is empty for a login: little of it all goes by so.
    lost = (address.logins - logins) * (LOGIN + PARTING)
    assert lost < 0.02 * 20 * 60
    assert sum(held.values()) > 0.97 * 20


def test_nobody_starves_where_there_is_not_one_for_each() -> None:
    address = Address(5)
    pools = [address.pool(f"org_{number}") for number in range(30)]
    for pool in pools:
        pool.start(2)
    address.run(5)
    held = address.run(60)
    for pool in pools:
        assert held[pool.handle] == pytest.approx(5 / 30, rel=0.25)
        # Six rounds of a tenure each would be exact.
        assert max(pool.waits) < 4 * 6 * TENURE
    assert address.logins * (LOGIN + PARTING) < 0.1 * 5 * 65


def test_weights_also_hold_where_there_is_not_one_for_each() -> None:
    address = Address(4)
    for number in range(12):
        address.pool(f"org_{number}", weight=4 if number < 2 else 1).start(9)
    address.run(5)
    held = address.run(120)
    heavy = [held[f"org_{number}"] for number in range(2)]
    light = [held[f"org_{number}"] for number in range(2, 12)]
    assert heavy == pytest.approx([4 * 4 / 18] * 2, rel=0.15)
    assert light == pytest.approx([4 * 1 / 18] * 10, rel=0.25)


@dataclass(frozen=True)
class Load:
    """Who uses an address, and how: weight, clients and seconds of a transaction."""

    places: int
    organizations: dict[str, tuple[int, int, float]]

    def score(self) -> float:
        """From 0 to 100: how near everybody came to its due, with what was there.

        The least part of a due that anybody got, times the part of all connections
        that were there to be used. Who came first had a second of its own.
        """
        address = Address(self.places)
        for handle, (weight, clients, busy) in self.organizations.items():
            address.pool(handle, weight=weight, busy=busy).start(clients)
            address.run(1)
        address.run(2)
        held = address.run(20)
        weights = [weight for weight, _, _ in self.organizations.values()]
        demands = [clients for _, clients, _ in self.organizations.values()]
        dues = share_out(self.places, weights, demands)
        least = min(held[one] / due for one, due in zip(held, dues, strict=True))
        return 100 * min(least, 1) * sum(held.values()) / min(self.places, sum(demands))


LOADS = {
    "one client among many": Load(
        10, {"org_noisy": (40, 40, 0.01), "org_quiet": (1, 1, 0.01)}
    ),
    "all tiers at once": Load(
        20,
        {
            "org_enterprise": (40, 100, 0.005),
            "org_pro": (10, 50, 0.02),
            "org_starter": (2, 10, 0.1),
            "org_free": (1, 3, 0.002),
        },
    ),
    "long and short transactions": Load(
        9, {f"org_{busy}": (1, 20, busy) for busy in (0.5, 0.05, 0.001)}
    ),
    "more organisations than connections": Load(
        6, {f"org_{number}": (1 + number % 2, 3, 0.005) for number in range(18)}
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_the_score_is_high(name: str) -> None:
    assert LOADS[name].score() > 85


@pytest.mark.parametrize("name", LOADS)
def test_the_score_is_low_where_nobody_has_to_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sharing, "displace", lambda *_: False)
    assert LOADS[name].score() < 10


def test_what_somebody_leaves_goes_to_others_at_once() -> None:
    address = Address(10)
    staying, leaving = address.pool("org_a"), address.pool("org_b")
    staying.start(40)
    leaving.start(40)
    assert address.run(5)["org_b"] == pytest.approx(5, rel=0.1)
    leaving.stop()
    address.run(RECENT + 0.5)
    assert (staying.size, leaving.size) == (10, 0)
    leaving.start(40)
    address.run(1)
    assert leaving.size == pytest.approx(5, abs=1)


def test_idle_servers_of_others_are_no_obstacle() -> None:
    address = Address(10)
    for number in range(10):
        pool = address.pool(f"org_{number}")
        pool.start(1)
        address.run(0.05)
        pool.stop()
    address.run(RECENT + 0.1)
    assert address.allotment.taken == 10
    late = address.pool("org_late")
    late.start(1)
    address.run(0.1)
    assert late.waits[0] < 2 * (LOGIN + PARTING)


def test_databases_of_one_organisation_share_equally() -> None:
    address = Address(12)
    one, two = address.pool("org_a"), address.pool("org_a")
    other = address.pool("org_b")
    one.start(50)
    address.run(1)
    two.start(50)
    other.start(50)
    address.run(5)
    before = {pool: pool.served for pool in (one, two, other)}
    assert before
    sizes = {pool: 0.0 for pool in (one, two, other)}
    for _ in range(20_000):
        address.world.run(0.001)
        for pool in sizes:
            sizes[pool] += pool.size / 20_000
    assert sizes[one] == pytest.approx(3, rel=0.1)
    assert sizes[two] == pytest.approx(3, rel=0.1)
    assert sizes[other] == pytest.approx(6, rel=0.1)


def test_who_can_not_give_does_not_keep_others_from_giving() -> None:
    address = Address(10)
    sessions = address.pool("org_sessions", busy=1e9)
    sessions.start(5)
    address.run(0.1)
    busy = address.pool("org_busy", weight=40)
    busy.start(40)
    address.run(3)
    assert (sessions.size, busy.size) == (5, 5)
    quiet = address.pool("org_quiet", busy=0.002, think=0.05)
    quiet.start(1)
    address.run(0.1)
    assert quiet.waits
    address.run(10)
    assert (sessions.size, busy.size, quiet.size) == (5, 4, 1)
    assert quiet.logins == 1


def test_a_place_that_is_given_is_the_first_to_ask_in_need() -> None:
    address = Address(2)
    holder = address.pool("org_holder", busy=1.0)
    holder.start(2)
    address.run(0.1)
    late, later = address.pool("org_late"), address.pool("org_later", weight=40)
    late.start(1)
    address.run(0.05)
    later.start(1)
    address.run(10)
    assert late.waits
    assert later.waits


def test_a_failed_attempt_is_not_repeated_at_once() -> None:
    address = Address(2)
    failing = address.pool("org_failing", is_failing=True)
    failing.start(5)
    working = address.pool("org_working")
    working.start(5)
    address.run(10)
    assert failing.logins <= 2 * 10 / TENURE
    assert len(working.waits) > 1000


def test_a_bound_that_is_lowered_is_reached_and_a_raised_one_used() -> None:
    address = Address(10)
    for number in range(2):
        address.pool(f"org_{number}").start(20)
    address.run(1)
    assert address.allotment.taken == 10
    address.max_servers = 10
    address.allotment.max_servers = 4
    address.run(1)
    assert address.allotment.taken <= 4
    address.max_servers = 40
    address.allotment.max_servers = 40
    address.run(1)
    assert address.allotment.taken == 40
    address.allotment.max_servers = 0
    address.max_servers = 10**6
    address.pools[0].start(30)
    address.run(1)
    assert sum(pool.size for pool in address.pools) > 40


def test_without_a_bound_everybody_has_what_it_asks_for() -> None:
    address = Address(0)
    address.max_servers = 10**6
    pools = [address.pool(f"org_{number}") for number in range(5)]
    for pool in pools:
        pool.start(30)
    address.run(0.5)
    assert [pool.size for pool in pools] == [30] * 5


@pytest.fixture(params=range(5))
def chaos(request: pytest.FixtureRequest) -> Iterator[Address]:
    address = Address(7)
    address.world.random.seed(request.param)
    yield address


def test_whatever_happens_the_bound_holds_and_all_is_given_back(chaos: Address) -> None:
    dice = chaos.world.random
    pools = [
        chaos.pool(
            f"org_{number % 9}",
            weight=1 + number % 4,
            busy=dice.choice([0.001, 0.02, 0.3]),
            think=dice.choice([0.0, 0.01, 0.5]),
            max_servers=dice.choice([1, 3, 100]),
        )
        for number in range(12)
    ]
    for _ in range(60):
        pool = dice.choice(pools)
        if pool.clients:
            pool.stop()
        else:
            pool.start(dice.randint(1, 20))
        pool.is_failing = dice.random() < 0.1
        chaos.run(0.3)
    for pool in pools:
        pool.is_failing = False
        pool.stop()
    chaos.run(3)
    assert chaos.allotment.taken == sum(pool.size for pool in pools)
    asker = chaos.pool("org_asker")
    asker.start(30)
    chaos.run(3)
    assert asker.size == 7
