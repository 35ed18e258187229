"""Every key and channel that ogelproxy uses in Redis, spelled once.

Redis is a cache and a meeting point: losing all of it loses nothing but warmth.
"""

from __future__ import annotations

#: Hash: which hosts may mint a part of every limit without asking (`limiter`).
HOSTS = "o7s:hosts"
#: Hash: the run of the server that granted what there is, since when (`slots`,
#: `limiter`).
EPOCH = "o7s:epoch"
#: Channel: organisations that changed, as ``HANDLE VERSION``, and those that were
#: deleted, as ``HANDLE VERSION gone`` (`tenants`).
CHANGES = "o7s:changes"
#: What a proxy needs to start while the control plane is away (`tenants`).
START = "o7s:start"
#: Channel: cancel requests for clients of other machines (`cancel`).
CANCELS = "o7s:cancels"


def tier(handle: str) -> str:
    """The cached record of an organisation (`tenants`)."""
    return f"tier:{handle}"


def connections(handle: str) -> str:
    """Hash: the connections of an organisation, by host (`slots`)."""
    return f"connections:{handle}"


def ratelimit(handle: str) -> str:
    """Hash: the bucket of an organisation and the leases on it (`limiter`)."""
    return f"ratelimit:{handle}"
