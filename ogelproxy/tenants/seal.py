"""Sealed records: tenants as they are left in Redis, readable by proxies only.

A record holds connection strings and key verifiers, so it is encrypted, with the
handle and the version that it belongs to: none can pass for another's. In clear is
what the script needs that keeps a newer one from being replaced. What can't be
read, made with other keys or by another release, is as good as nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from ogelproxy.config import Secret
from ogelproxy.errors import SecretUnreadable
from ogelproxy.tenants.model import (
    DatabaseType,
    KeyVerifier,
    LimiterMode,
    PoolMode,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.tenants.vault import Vault

#: Told apart by the letters that the script knows.
RECORD, GONE = b"r", b"d"

#: Changes with the fields of what is sealed: another release may have others.
LAYOUT = hashlib.sha256(
    repr(
        [
            (kind.__name__, field.name, field.type)
            for kind in (Tenant, Tier, KeyVerifier, Target)
            for field in dataclasses.fields(kind)
        ]
    ).encode()
).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a tenant: its record, or that it was deleted."""

    handle: str
    version: int  # of the record; of the last one known, where it was deleted
    known_at: float  # Unix time when that was true
    record: Tenant | None  # None: deleted


def seal(vault: Vault, entry: Entry) -> bytes:
    """Return what `unseal` reads: ``VERSION LETTER TOKEN``."""
    content = orjson.dumps((LAYOUT, entry), default=_plain)
    return b"%d %b %b" % (entry.version, _letter(entry), vault.seal(content))


def unseal(vault: Vault, handle: str, sealed: bytes) -> Entry | None:
    """Return the entry of that handle, or None if it can't be read."""
    try:
        version, letter, token = sealed.split(b" ")
        layout, fields = orjson.loads(vault.unseal(token))
        if layout != LAYOUT:
            return None
        record = fields["record"] and _tenant(fields["record"])
        entry = Entry(**fields | {"record": record})
        named = (handle, int(version), letter)
    except (SecretUnreadable, ValueError, TypeError, KeyError):
        return None
    return entry if named == (entry.handle, entry.version, _letter(entry)) else None


def _letter(entry: Entry) -> bytes:
    return GONE if entry.record is None else RECORD


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Secret):
        return value.get_secret_value()
    if isinstance(value, UUID):  # asyncpg has a class of its own
        return str(value)
    raise TypeError(f"{type(value).__name__} can't be sealed")


def _tenant(fields: Mapping[str, Any]) -> Tenant:
    tier = fields["tier"]
    return Tenant(
        **{
            **fields,
            "id": UUID(fields["id"]),
            "tier": Tier(**{**tier, "features": tuple(tier["features"])}),
            "salt": base64.b64decode(fields["salt"]),
            "keys": tuple(map(_key, fields["keys"])),
            "databases": {
                name: _target(target) for name, target in fields["databases"].items()
            },
            "limiter_mode": LimiterMode(fields["limiter_mode"]),
        }
    )


def _key(fields: Mapping[str, str]) -> KeyVerifier:
    return KeyVerifier(
        id=UUID(fields["id"]),
        name=fields["name"],
        stored_key=base64.b64decode(fields["stored_key"]),
        server_key=base64.b64decode(fields["server_key"]),
    )


def _target(fields: Mapping[str, Any]) -> Target:
    return Target(
        **{
            **fields,
            "id": UUID(fields["id"]),
            "type": DatabaseType(fields["type"]),
            "pool_mode": PoolMode(fields["pool_mode"]),
            "dsn": Secret(fields["dsn"]),
        }
    )
