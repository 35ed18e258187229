"""Traffic of all targets: what clients count into, and its sums over time.

One `Traffic` per target and tier, as long as the target has a pool; then only the
sums per tier and type go on, so that metrics never fall. Knows no pool and no client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from uuid import UUID

from ogelproxy._traffic import Traffic

__all__ = ["Traffic", "TrafficBook", "Work", "averages"]

#: Seconds between the pictures that rates are measured from.
PERIOD = 60.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a target did, as a console tells it: counts, bytes, microseconds."""

    loans: int = 0
    transactions: int = 0
    queries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    transaction_us: int = 0
    query_us: int = 0
    wait_us: int = 0
    client_parses: int = 0
    server_parses: int = 0
    binds: int = 0
    logins: int = 0

    @classmethod
    def of(cls, traffic: Traffic) -> Work:
        return cls(
            traffic.loans,
            traffic.transactions,
            traffic.queries,
            traffic.bytes_in,
            traffic.bytes_out,
            round(traffic.transaction_seconds * 1e6),
            round(traffic.query_seconds * 1e6),
            round(traffic.wait_seconds * 1e6),
            traffic.client_parses,
            traffic.server_parses,
            traffic.binds,
            traffic.logins,
        )

    def __add__(self, other: Work) -> Work:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Work(*(one + another for one, another in pairs))

    def rates(self, before: Work, seconds: float) -> tuple[float, ...]:
        """Return what came since `before`, each number per second."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return tuple((now - then) / seconds for now, then in pairs)


#: The numbers of `Work`, in its order.
FIELDS = tuple(each.name for each in fields(Work))
#: Times, and what they are averages over.
OCCURRENCES = {
    "transaction_us": "transactions",
    "query_us": "queries",
    "wait_us": "loans",
}
NO_RATES = (0.0,) * len(FIELDS)


def averages(rates: Sequence[float]) -> tuple[int, ...]:
    """Return rates, or sums of them, as shown: per second, and times per occurrence.

    So PgBouncer's averages are defined (its doc/usage.md, SHOW STATS).
    """
    by_name = dict(zip(FIELDS, rates, strict=True))
    shown = []
    for name, rate in by_name.items():
        if name in OCCURRENCES:
            count = by_name[OCCURRENCES[name]]
            # Quotients of whole numbers, which rounding may leave just below one.
            shown.append(int(rate / count + 1e-6) if count else 0)
        else:
            shown.append(round(rate))
    return tuple(shown)


class TrafficBook:
    """The traffic of one engine. `now` is monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._traffic: dict[tuple[UUID, str, str], Traffic] = {}
        self._past: dict[tuple[str, str], Traffic] = {}  # of targets without a pool
        # When rates are measured from, and what there was then; the later picture
        # becomes the earlier one, so that rates are over one to two periods.
        self._pictures = [(now, dict[UUID, Work]()), (now, dict[UUID, Work]())]

    def of(self, target_id: UUID, tier: str, database_type: str) -> Traffic:
        """Return what clients of this tier count into."""
        key = (target_id, tier, database_type)
        found = self._traffic.get(key)
        if found is None:
            found = self._traffic[key] = Traffic(tier, database_type)
        return found

    def sums(self) -> list[Traffic]:
        """Return everything ever counted, by tier and database type."""
        sums: dict[tuple[str, str], Traffic] = {}
        for traffic in (*self._past.values(), *self._traffic.values()):
            labels = (traffic.tier, traffic.database_type)
            sums.setdefault(labels, Traffic(*labels)).add(traffic)
        return list(sums.values())

    def work(self) -> dict[UUID, Work]:
        """Return what each target with a pool did."""
        work: defaultdict[UUID, Work] = defaultdict(Work)
        for (target_id, _, _), traffic in self._traffic.items():
            work[target_id] += Work.of(traffic)
        return dict(work)

    def past(self) -> Work:
        """Return what targets did that have no pool any more."""
        return sum(map(Work.of, self._past.values()), Work())

    def rates(self, now: float) -> dict[UUID, tuple[float, ...]]:
        """Return the rates of each target with a pool; see `averages`."""
        since, before = self._pictures[0]
        seconds = max(now - since, 1.0)
        return {
            target_id: work.rates(before.get(target_id, Work()), seconds)
            for target_id, work in self.work().items()
        }

    def sweep(self, now: float, live: Iterable[UUID]) -> None:
        """Take a picture when it is time; keep only sums of targets not `live`."""
        if now - self._pictures[1][0] < PERIOD:
            return
        self._pictures = [self._pictures[1], (now, self.work())]
        kept = set(live)
        for key in [key for key in self._traffic if key[0] not in kept]:
            labels = key[1:]
            self._past.setdefault(labels, Traffic(*labels)).add(self._traffic.pop(key))
