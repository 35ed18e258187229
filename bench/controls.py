"""Controls: limiters with one known mistake each.

Each must be seen to break a limit under a load that the right limiter passes. They
change the text of the script or a constant in this process; what isn't found any
more raises, so that a control never quietly tries the right limiter.
"""

from __future__ import annotations

from collections.abc import Callable

from ogelproxy import limiter
from ogelproxy.redis import Script


def no_learning() -> None:
    """A Redis that forgot everything takes all it doesn't know for full."""
    _replace("complete or not kept.run and now > since + ttl * LONGER", "true")


def no_outstanding() -> None:
    """The bucket fills to the brim whatever hosts hold of it."""
    _replace("capacity - out, level", "capacity, level")


def no_expiry() -> None:
    """Hosts keep what Redis has long counted as gone."""
    limiter.CHUNK_TTL = 1000.0
    _replace("tonumber(ARGV[10])", "1000000")


CONTROLS: dict[str, Callable[[], None]] = {
    "no learning mode": no_learning,
    "outstanding leases ignored": no_outstanding,
    "expiry not checked": no_expiry,
}


def _replace(old: str, new: str) -> None:
    text = limiter.LEND.text
    if text.count(old) != 1:
        raise LookupError(f"{old!r} is not in limiter.lua once: mend the control")
    limiter.LEND = Script(text.replace(old, new))
