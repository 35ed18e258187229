"""Flights: how many queries an organisation may have under way in this process.

Beside the rate (`limiter`), which does not guard a database from a few slow queries.
Counting and waiting are `_flights`'; here is which organisation may have how many.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from ogelproxy._flights import Flights
from ogelproxy.errors import TooManyInFlight
from ogelproxy.tenants.model import LimiterMode, Tenant

__all__ = ["FlightBook", "Flights"]


class FlightBook:
    """The flights of each organisation that has clients.

    Each of `workers` processes has its part of a limit, rounded up: `max_in_flight`
    of 3 is 2 in each of two.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # Kept by those who are counted in them: without any there is nothing to keep.
        self._flights = WeakValueDictionary[str, Flights]()

    def of(self, tenant: Tenant) -> Flights:
        """Return what all connections of the organisation are counted in."""
        flights = self._flights.get(tenant.handle)
        if flights is None:
            flights = self._flights[tenant.handle] = Flights()
        self._shape(flights, tenant)
        return flights

    def update(self, tenant: Tenant) -> None:
        """Carry a change of tier or limiter mode to open connections."""
        flights = self._flights.get(tenant.handle)
        if flights is not None:
            self._shape(flights, tenant)

    def _shape(self, flights: Flights, tenant: Tenant) -> None:
        if tenant.version >= flights.version:  # else of a login before the change
            flights.shape(self._most(tenant), tenant.version)

    def _most(self, tenant: Tenant) -> int:
        limit = tenant.tier.max_in_flight
        if limit is None or tenant.limiter_mode is not LimiterMode.ENFORCE:
            return 0
        return -(-limit // self._workers)


def refusal(tenant: Tenant | None, waited: float) -> TooManyInFlight:
    """Make the error for a query that waited in vain; `waited` is in seconds."""
    if tenant is None:
        return TooManyInFlight(waited)
    return TooManyInFlight(
        waited,
        detail=f"tier={tenant.tier.name} limit={tenant.tier.max_in_flight}",
        hint="end transactions sooner, use fewer connections at once, or upgrade",
    )
