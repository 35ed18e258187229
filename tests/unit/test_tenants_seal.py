"""Sealed records: whole, and for those with the same keys and release only."""

from __future__ import annotations

import dataclasses
from itertools import cycle
from uuid import UUID, uuid4

import pytest

from ogelproxy.config import Secret
from ogelproxy.tenants import seal as sealing
from ogelproxy.tenants.model import (
    DatabaseType,
    KeyVerifier,
    LimiterMode,
    PoolMode,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.tenants.seal import Entry, seal, unseal
from ogelproxy.tenants.vault import Vault

VAULT = Vault(Secret("a passphrase of the tests"))

PRO = Tier(
    name="pro",
    max_connections=50,
    max_queries_per_second=200.5,
    max_storage_gb=100.0,
    may_burst=True,
    monthly_fee=50.0,
    included_vcpu_hours=200.0,
    included_memory_gb_hours=500.0,
    overage_vcpu_hour=0.12,
    overage_gb_hour=None,
    max_databases=None,
    features=("all types", "9 o\u2019clock support"),
    statement_timeout=300.0,
    work_mem_kb=16384,
    weight=10,
    max_in_flight=25,
)
WHOLE = Tenant(
    id=uuid4(),
    handle="org_a",
    name="Ärger & Söhne\x00",
    tier=PRO,
    is_suspended=True,
    version=2**63 - 1,
    salt=bytes(range(256)),
    iterations=8192,
    keys=tuple(KeyVerifier(uuid4(), name, b"\0" * 32, b"\xff" * 32) for name in "ab"),
    databases={
        type.value: Target(
            uuid4(), type.value, type, mode, Secret(f"{type}://role:word@host/db")
        )
        for type, mode in zip(DatabaseType, cycle(PoolMode), strict=False)
    },
    limiter_mode=LimiterMode.WARN,
    max_wait=0.1,
    connections_override=0,
)


def entry(version: int = 7, record: Tenant | None = None) -> Entry:
    return Entry("org_a", version, 1e9, record)


def tenant() -> Tenant:
    tier = Tier("free", 5, 10, 1, False, 0, 5, 10, None, None, 1)
    return Tenant(uuid4(), "org_a", "A", tier, False, 7, b"salt")


def test_what_was_sealed_comes_out_as_it_was() -> None:
    for record in (WHOLE, tenant()):
        sealed = seal(VAULT, entry(record.version, record))
        found = unseal(VAULT, "org_a", sealed)
        assert found == entry(record.version, record)
        # Equal is not enough: an enumeration's member equals its text.
        assert repr(found) == repr(entry(record.version, record))


def test_a_deletion_is_sealed_too() -> None:
    assert unseal(VAULT, "org_a", seal(VAULT, entry())) == entry()


def test_an_identifier_of_the_database_driver_is_one() -> None:
    class DriversUUID(UUID):
        pass

    record = dataclasses.replace(tenant(), id=DriversUUID(int=5))
    found = unseal(VAULT, "org_a", seal(VAULT, entry(7, record)))
    assert found is not None and found.record == record


@pytest.mark.parametrize(
    ("old", "new"), [(b"7 r ", b"8 r "), (b"7 r ", b"7 d "), (b"7 r ", b"7 x ")]
)
def test_what_stands_in_clear_can_not_be_changed(old: bytes, new: bytes) -> None:
    sealed = seal(VAULT, entry(7, tenant()))
    assert sealed.startswith(old)
    assert unseal(VAULT, "org_a", sealed.replace(old, new, 1)) is None


def test_a_record_can_not_be_read_as_anothers() -> None:
    assert unseal(VAULT, "org_b", seal(VAULT, entry(7, tenant()))) is None


@pytest.mark.parametrize(
    "keys",
    [
        "another passphrase of it",
        "a passphrase of the tests,another passphrase of it",
        "another passphrase of it,a passphrase of the tests",
    ],
)
def test_who_has_other_keys_reads_nothing(keys: str) -> None:
    sealed = seal(VAULT, entry(7, tenant()))
    assert unseal(Vault(Secret(keys)), "org_a", sealed) is None


def test_another_release_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal(VAULT, entry(7, tenant()))
    monkeypatch.setattr(sealing, "LAYOUT", "another")
    assert unseal(VAULT, "org_a", sealed) is None


def test_a_connection_string_is_no_record() -> None:
    token = VAULT.encrypt(Secret("postgresql://")).encode()
    assert unseal(VAULT, "org_a", b"7 r " + token) is None
