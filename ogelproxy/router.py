"""Router: organisation and database name to the pool that serves them.

Never a fallback: a name that is not in the tenant's record is refused. Pools
are keyed by the target's id, which belongs to one organisation, so no server
is ever shared between two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from ogelproxy.allotment import Allotment
from ogelproxy.config import Pool as PoolConfig
from ogelproxy.errors import DatabaseDisabled, DatabaseUnknown, NotSupported
from ogelproxy.orders import Orders
from ogelproxy.pool import Pool, session_parameters
from ogelproxy.server import Address
from ogelproxy.tenants.model import DatabaseType, Target, Tenant

if TYPE_CHECKING:
    from ogelproxy.relay import Relay

#: Seconds after which a pool without clients and servers is forgotten.
POOL_TTL = 60.0


class Router:
    """The pools of one engine, made when first needed."""

    def __init__(self, config: PoolConfig, host: Relay, workers: int) -> None:
        self._config = config
        self._host = host
        self._workers = workers  # processes that share an address's servers
        self._pools: dict[UUID, Pool] = {}
        # Of each host and port that there are pools for.
        self._allotments: dict[tuple[str, int], Allotment] = {}
        # Not routed to, with clients or servers that are yet to go.
        self._unrouted: list[Pool] = []
        self._unused_since: dict[UUID, float] = {}
        #: What operators asked for; changed by `obey`.
        self.orders = Orders()

    @property
    def pools(self) -> list[Pool]:
        return [*self._pools.values(), *self._unrouted]

    def route(self, tenant: Tenant, database: str) -> Target:
        """Find the target. Raises DatabaseUnknown, DatabaseDisabled, NotSupported."""
        target = tenant.databases.get(database)
        if target is None:
            raise DatabaseUnknown(database)
        if target.type is not DatabaseType.POSTGRES:
            raise NotSupported(f"database type {target.type}")
        if target.id in self.orders.disabled:
            raise DatabaseDisabled(database)
        return target

    def pool(self, tenant: Tenant, target: Target) -> Pool:
        """The pool of `target`, made when there is none."""
        pool = self._pools.get(target.id)
        if pool is None:
            allotment = self._allotment(Address.parse(target.dsn.get_secret_value()))
            pool = Pool(tenant, target, self._config, self._host, allotment)
            allotment.join(pool)
            pool.is_paused = self.orders.pauses(target.id)
            self._pools[target.id] = pool
        return pool

    def _allotment(self, address: Address) -> Allotment:
        key = (address.host.lower(), address.port)
        found = self._allotments.get(key)
        if found is None:
            loop = self._host.reactor.loop
            found = self._allotments[key] = Allotment(
                self._places(), loop.time, loop.call_later
            )
        return found

    def _places(self) -> int:
        """This process's part of what may be opened at one address; 0 is no bound."""
        bound = self._config.max_servers_per_address
        return max(bound // self._workers, 1) if bound else 0

    def adopt(self, pool: Pool) -> None:
        """Look after a pool that nobody is routed to, until it is empty."""
        self._unrouted.append(pool)

    def update(self, old: Tenant, new: Tenant | None) -> None:
        """Follow a change of a tenant's record.

        Targets that changed or went get new pools; a change of the tier's
        session settings only replaces the servers.
        """
        for each in self.pools:
            if new is not None and each.handle == new.handle:
                each.weight = new.tier.weight
        targets = {} if new is None else {t.id: t for t in new.databases.values()}
        for before in old.databases.values():
            pool = self._pools.get(before.id)
            if pool is None:
                continue
            after = targets.get(before.id)
            if after != before or new is None:
                del self._pools[before.id]
                self._unused_since.pop(before.id, None)
                pool.retire_all()
                self._unrouted.append(pool)
            elif pool.parameters != (parameters := session_parameters(new)):
                pool.parameters = parameters
                pool.retire_all()

    def sweep(self, now: float) -> None:
        for pool in list(self._unrouted):
            pool.sweep(now)
            if not pool.is_used:
                self._unrouted.remove(pool)
                pool.allotment.leave(pool)
        for key, pool in list(self._pools.items()):
            pool.sweep(now)
            is_kept = key in self.orders.paused or key in self.orders.disabled
            if pool.is_used or is_kept:
                self._unused_since.pop(key, None)
            elif now - self._unused_since.setdefault(key, now) > POOL_TTL:
                del self._pools[key]
                del self._unused_since[key]
                pool.allotment.leave(pool)
        for address, allotment in list(self._allotments.items()):
            if not len(allotment) and not allotment.taken:
                del self._allotments[address]

    # What operators ask for.

    def pools_of(self, target_id: UUID) -> list[Pool]:
        """Return the target's pool, and those it replaced that are yet to go."""
        return [pool for pool in self.pools if pool.target.id == target_id]

    def obey(self, orders: Orders) -> None:
        """Lend servers, or none, as operators want it; `Pool.pause` says how."""
        if orders.version < self.orders.version:
            return  # overtaken on its way here
        self.orders = orders
        for pool in self.pools:
            is_paused = orders.pauses(pool.target.id)
            if is_paused and not pool.is_paused:
                pool.pause()
            elif pool.is_paused and not is_paused:
                pool.resume()

    def reload(self, config: PoolConfig) -> None:
        self._config = config
        for pool in self.pools:
            pool.config = config
        for allotment in self._allotments.values():
            allotment.max_servers = self._places()

    def close(self) -> None:
        for pool in self.pools:
            pool.retire_all()
