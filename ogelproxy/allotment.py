"""Allotment: the server connections of one address, shared out among organisations.

Databases of many organisations may lie on one Postgres server, which takes only so
many connections. While there are enough, whoever asks gets one. When there are not,
each organisation is due a part by weighted max-min fairness: at least one connection
while that is possible, never more than it uses, and what is left by the weights of
the tiers; among databases of one organisation equally. Parts are fractions: who holds
less than its due gains credit with time and who holds more loses it, as in weighted
fair queueing, so that over time everybody has its part.

A connection is never shared: what one organisation has too much is closed, when it is
idle or its transaction has ended, and another opens one in its place. That costs a
login, so that a server is kept for a while first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

#: Seconds that a server is kept before its place may go to others. A login takes 5 to
#: 20 ms, so that at most a few percent of the time go by with them.
TENURE = 0.25
#: Seconds after its last use in which an idle server counts as needed.
RECENT = 1.0
#: Seconds in which lacking one connection comes to a claim on another.
HORIZON = 0.25
#: How much more than a whole connection claims must differ by to move one, and how
#: much credit counts at most: in connections.
SLACK = 0.5
MAX_CREDIT = 2.0
#: Seconds between two looks while somebody lacks a server, and more for each pool.
INTERVAL = 0.02
INTERVAL_PER_POOL = 0.0001
#: Seconds without another attempt for a pool that couldn't open its server.
RETRY_INTERVAL = 0.25
#: Servers that one look moves at most.
MAX_MOVES = 32


class Member(Protocol):
    """A pool, as an allotment sees it."""

    handle: str  # of its organisation
    weight: int  # of the organisation's tier
    size: int
    opening: int
    surplus: int  # servers to close when their transactions end; set here
    tenure: float  # seconds that they must have been there; set here

    def lack(self) -> int:
        """How many more servers it has use and room for."""

    def demand(self, now: float) -> int:
        """How many servers it uses, used within RECENT seconds, or waits for."""

    def open_one(self) -> None:
        """Open one more server, in a place taken with `take`."""

    def close_idle(self, now: float) -> bool:
        """Close the idle server of at least `tenure` used longest ago, if any."""


class Timer(Protocol):
    def cancel(self) -> object: ...


@dataclass(slots=True, eq=False)
class Share:
    """What one pool has of an address, and should have."""

    pool: Member
    demand: int = 0  # servers that it needs
    due: float = 0.0  # servers that it should have
    held: int = 0  # those it has, or will have by what was just decided
    credit: float = 0.0  # seconds times servers that it lacked; below 0 had beyond
    stuck: float = 0.0  # seconds for which it closed none that it should have
    rests_until: float = 0.0  # after a failed attempt
    _size: int = 0  # at the last look

    @property
    def claim(self) -> float:
        """By how many servers it is behind its due; below 0 ahead of it."""
        return self.due - self.held + self.credit / HORIZON

    def see(self, now: float, elapsed: float) -> bool:
        """Look at the pool, `elapsed` seconds later; whether it has or lacks any."""
        pool = self.pool
        is_stuck = pool.surplus > 0 and pool.size >= self._size
        self.stuck = self.stuck + elapsed if is_stuck else 0.0
        pool.surplus = 0
        self._size = pool.size
        self.held = pool.size + pool.opening
        if not self.held and pool.lack() <= 0:
            self.demand, self.credit = 0, 0.0
            return False
        self.demand = pool.demand(now)
        return True

    def earn(self, elapsed: float) -> None:
        """Gain or lose credit for `elapsed` seconds of lacking or having beyond."""
        most = MAX_CREDIT * HORIZON
        self.credit += (self.due - self.held) * elapsed
        self.credit = max(-most, min(self.credit, most))


class Allotment:
    """The places for server connections at one address.

    `max_servers` is how many there are, 0 for any number. A place is taken from the
    beginning of a login until Postgres has ended the session.
    """

    def __init__(
        self,
        max_servers: int,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self._max_servers = max_servers
        self._clock = clock
        self._call_later = call_later
        self.taken = 0
        self._parting = 0  # of the taken, those whose session is being ended
        self._shares: dict[Member, Share] = {}
        self._is_short = False  # somebody lacks a server, or there are too many
        self._looked_at = -RECENT
        self._timer: Timer | None = None

    # Pools come, ask and go.

    def join(self, pool: Member) -> None:
        self._shares[pool] = Share(pool)

    def leave(self, pool: Member) -> None:
        """Forget a pool without servers."""
        del self._shares[pool]

    def __len__(self) -> int:
        """Return how many pools there are."""
        return len(self._shares)

    @property
    def max_servers(self) -> int:
        return self._max_servers

    @max_servers.setter
    def max_servers(self, value: int) -> None:
        self._max_servers = value
        self._is_short = True
        self._look_soon()

    @property
    def has_room(self) -> bool:
        """Whether a place may be taken without asking."""
        return not self._max_servers or (
            self.taken < self._max_servers and not self._is_short
        )

    def ask(self, pool: Member) -> None:
        """Have `pool` open the server that it lacks, now or when it is its turn."""
        if self.has_room:
            pool.open_one()
        else:
            self._is_short = True
            self._look_soon()

    # Places.

    def take(self) -> None:
        self.taken += 1

    def failed(self, pool: Member) -> None:
        """Give back a place in which no server could be opened."""
        self.taken -= 1
        if pool in self._shares:
            self._shares[pool].rests_until = self._clock() + RETRY_INTERVAL
        self._look_soon()

    def part(self) -> None:
        """The server in a place is being closed."""
        self._parting += 1

    def parted(self) -> None:
        """It is closed: its place is free."""
        self._parting -= 1
        self.taken -= 1
        if self._is_short:
            self._look()

    # Sharing out.

    def _look_soon(self) -> None:
        if self._timer is None and self._is_short:
            interval = INTERVAL + INTERVAL_PER_POOL * len(self._shares)
            wait = max(self._looked_at + interval - self._clock(), 0.0)
            self._timer = self._call_later(wait, self._timed)

    def _timed(self) -> None:
        self._timer = None
        self._look()
        self._look_soon()

    def _look(self) -> None:
        """Give free places away, and see whose servers have to go."""
        now = self._clock()
        shares = self._account(now)
        capacity = self._max_servers or self.taken + MAX_MOVES
        coming = capacity - self.taken + self._parting
        sharing = Sharing(shares, capacity, now)
        for _ in range(min(MAX_MOVES, -coming)):
            sharing.shrink()  # the bound was lowered
        lacks = {
            share: share.pool.lack() for share in shares if now >= share.rests_until
        }
        short = [share for share in lacks if lacks[share] > 0]
        while short and sharing.moves < MAX_MOVES:
            first = max(short, key=sharing.rank)
            if coming <= 0 and not sharing.displace(first):
                short.remove(first)
                continue
            coming -= 1
            if self.taken < capacity:
                first.pool.open_one()
            sharing.give(first)
            lacks[first] -= 1
            if not lacks[first]:
                short.remove(first)
        # Also who rests after a failure goes on lacking.
        self._is_short = capacity < self.taken - self._parting or any(
            share.pool.lack() > 0 for share in shares
        )

    def _account(self, now: float) -> list[Share]:
        """Bring everybody's due and credit up to date; return who has or lacks any."""
        elapsed = min(now - self._looked_at, RECENT) if self._is_short else 0.0
        self._looked_at = now
        shares = []
        for share in self._shares.values():
            if share.see(now, elapsed):
                shares.append(share)
        self._settle_dues(shares)
        for share in shares:
            share.earn(elapsed)
        return shares

    def _settle_dues(self, shares: Iterable[Share]) -> None:
        """Share the places out to organisations, and theirs to their pools."""
        pools = defaultdict[str, list[Share]](list)
        for share in shares:
            pools[share.pool.handle].append(share)
        demands = [sum(share.demand for share in each) for each in pools.values()]
        capacity = self._max_servers or sum(demands)
        weights = [each[0].pool.weight for each in pools.values()]
        dues = share_out(capacity, weights, demands)
        for each, due in zip(pools.values(), dues, strict=True):
            parts = share_out(due, [1] * len(each), [share.demand for share in each])
            for share, part in zip(each, parts, strict=True):
                share.due = part


class Sharing:
    """One look at all shares of an address: who gives a place to whom."""

    def __init__(self, shares: Sequence[Share], capacity: int, now: float) -> None:
        self._shares = shares
        self._now = now
        self._held = Counter[str]()  # by organisation
        for share in shares:
            self._held[share.pool.handle] += share.held
        askers = {share.pool.handle for share in shares if share.demand}
        self._is_one_for_each = len(askers) <= capacity
        self.moves = 0

    def rank(self, share: Share) -> tuple[bool, float]:
        """Who is to be given a place first: the greatest."""
        return self._is_owed_one(share), share.claim

    def give(self, share: Share) -> None:
        """Count on a place for a pool."""
        share.held += 1
        self._held[share.pool.handle] += 1

    def shrink(self) -> None:
        """Have whoever is furthest ahead close a server."""
        holders = [share for share in self._shares if share.held]
        self._withdraw(min(holders, key=_claim), TENURE)

    def displace(self, first: Share) -> bool:
        """Have somebody close a server for `first`; whether anybody has to.

        The guaranteed one comes before dues, and needn't wait for a tenure to end:
        it isn't given again, so that it can't go back and forth.
        """
        is_owed_one = self._is_owed_one(first)
        tenure = 0.0 if is_owed_one else TENURE
        givers = [share for share in self._shares if share is not first]
        for last in sorted(filter(self._may_give, givers), key=_claim):
            if not is_owed_one and first.claim - last.claim <= 1 + SLACK:
                return False
            self._withdraw(last, tenure)
            if last.stuck < RECENT:
                return True
            # Sessions and long transactions: whoever ends first gives.
        return False

    def _is_owed_one(self, share: Share) -> bool:
        return self._is_one_for_each and not self._held[share.pool.handle]

    def _may_give(self, share: Share) -> bool:
        is_its_only = self._held[share.pool.handle] == 1 and share.demand > 0
        return share.held > 0 and not (self._is_one_for_each and is_its_only)

    def _withdraw(self, share: Share, tenure: float) -> None:
        self.moves += 1
        share.held -= 1
        self._held[share.pool.handle] -= 1
        share.pool.tenure = tenure
        if not share.pool.close_idle(self._now):
            share.pool.surplus += 1


def _claim(share: Share) -> float:
    return share.claim


def share_out(
    capacity: float, weights: Sequence[float], demands: Sequence[float]
) -> list[float]:
    """Share `capacity` out by weighted max-min fairness.

    Nobody is due more than it demands. Everybody who demands anything is due at least
    one, or its demand, as long as there is one for each; what is left goes by weight.
    """
    if sum(demands) <= capacity:
        return list(demands)
    fits = sum(demand > 0 for demand in demands) <= capacity
    floors = [min(demand, 1.0) if fits else 0.0 for demand in demands]
    # As the level rises, each is due its weight times the level, from where that is
    # more than its floor to where it is its demand.
    changes = [
        (end / weight, sign * weight)
        for weight, demand, floor in zip(weights, demands, floors, strict=True)
        for end, sign in ((floor, 1), (demand, -1))
    ]
    level, slope, given = 0.0, 0.0, sum(floors)
    for at, change in sorted(changes):
        if given + (at - level) * slope >= capacity:
            break
        given += (at - level) * slope
        level = at
        slope += change
    if slope > 0:
        level += (capacity - given) / slope
    return [
        min(max(weight * level, floor), demand)
        for weight, demand, floor in zip(weights, demands, floors, strict=True)
    ]
