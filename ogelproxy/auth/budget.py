"""FailureBudget: how often a login may fail before its source has to wait.

Counted per organisation *and* network that the client comes from, so that
whoever guesses at an organisation's keys locks out nobody but himself.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from functools import lru_cache

from ogelproxy.errors import LoginThrottled

#: An attacker can forget his own record only by failing this often elsewhere.
MAX_ENTRIES = 65_536
#: What one customer of an access provider usually gets (RFC 6177: /64 to /48).
IPV6_PREFIX = 64
IPV4_PREFIX = 24

#: Addresses whose networks are remembered: programs come from the same few.
REMEMBERED = 4096


@lru_cache(REMEMBERED)
def network(source: str) -> str:
    """Return the network of a client's address; all Unix sockets are one."""
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return "unix"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            place = (int(address), IPV6_PREFIX)
            return str(ipaddress.IPv6Network(place, strict=False))
        address = address.ipv4_mapped
    return str(ipaddress.IPv4Network((int(address), IPV4_PREFIX), strict=False))


class FailureBudget:
    """Allow `max_failures` at once, and as many again spread over `interval`.

    An entry is the time at which its failures are all forgotten (the generic
    cell rate algorithm, ITU-T I.371): one float, and each failure is forgiven
    by itself, so that a throttled client may soon try once more.
    """

    def __init__(
        self, max_failures: int, interval: float, *, max_entries: int = MAX_ENTRIES
    ) -> None:
        self._cost = interval / max_failures  # seconds that forgive one failure
        self._interval = interval
        self._max_entries = max_entries
        # (handle, network) → when it is even again; least recently failed first.
        self._even_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._even_at)

    def check(self, handle: str, source: str, now: float) -> None:
        """Raise LoginThrottled if one more failure would exceed the budget."""
        even_at = self._even_at.get((handle, network(source)), now)
        wait = even_at + self._cost - now - self._interval
        # Forgiving is a sum of floats: a microsecond is rounding, not failures.
        if wait > 1e-6:
            raise LoginThrottled(
                f"{handle} from {network(source)}: too many failed logins",
                hint=f"retry after {wait:.1f} s",
            )

    def record(self, handle: str, source: str, now: float) -> None:
        """Count one failure."""
        key = (handle, network(source))
        even_at = max(self._even_at.pop(key, now), now) + self._cost
        # Failures that were under way when the budget ran out cost no more.
        self._even_at[key] = min(even_at, now + self._interval)
        if len(self._even_at) > self._max_entries:
            self._even_at.popitem(last=False)
