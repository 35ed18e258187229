"""Replication: a server that is one client's from its login to its end.

Such a server is logged in to as the client asked (manual 55.4), never lent to
another client, and ends with its own. What passes through it does so as in session
mode: limited, counted and cancelled like anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ogelproxy._pool import Settings
from ogelproxy.allotment import Allotment
from ogelproxy.config import Pool as PoolConfig
from ogelproxy.errors import FeatureNotIncluded, NotSupported, TargetUnreachable
from ogelproxy.pool import Pool, SettingsRefused
from ogelproxy.tenants.model import REPLICATION, PoolMode, Target, Tenant

if TYPE_CHECKING:
    from ogelproxy.relay import Relay

#: Classes of SQLSTATEs that are about what the client asked for, in words that it
#: may read: bad settings, the role's rights, settings and servers that are used up.
#: Others tell about the login between proxy and server.
TELLING = ("22", "42", "53", "55")


def check(tenant: Tenant, target: Target) -> None:
    """Raise FeatureNotIncluded or NotSupported where replication may not be."""
    if REPLICATION not in tenant.tier.features:
        raise FeatureNotIncluded(REPLICATION, tenant.tier.name)
    if target.pool_mode is not PoolMode.SESSION:
        raise NotSupported(
            f"replication in pool mode {target.pool_mode}",
            hint="use a database in session mode",
        )


class ReplicationPool(Pool):
    """The one server of a client that replicates.

    `parameter` is the value of `replication` in the start-up packet, `wanted` its
    settings: a walsender takes them there only, as it may not know SQL.
    """

    def __init__(
        self,
        tenant: Tenant,
        target: Target,
        config: PoolConfig,
        host: Relay,
        *,
        parameter: str,
        wanted: Mapping[str, str],
    ) -> None:
        only = config.model_copy(update={"max_servers": 1})
        loop = host.reactor.loop
        # It takes no place of others: Postgres counts replication apart (manual
        # 20.6.1, max_wal_senders).
        alone = Allotment(0, loop.time, loop.call_later)
        super().__init__(tenant, target, only, host, alone)
        alone.join(self)
        self.parameters |= {**wanted, REPLICATION: parameter}

    async def open(self) -> Settings:
        """Open the server; return what the client is greeted with.

        Raises SettingsRefused with the server's own words, or TargetUnreachable.
        """
        try:
            settings = await self.settings(())
        except TargetUnreachable as error:
            if error.said.get("C", "")[:2] in TELLING:
                raise SettingsRefused(error.said) from error
            raise
        # From here on it counts as replaced: its first loan is its last.
        self.epoch += 1
        return settings
