"""Sealed records: whole, and for those with the same keys and release only."""

from __future__ import annotations

import dataclasses
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

numbers = st.floats(0, 1e12)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
secrets = st.binary(min_size=1, max_size=40)
tiers = st.builds(
    Tier,
    name=texts,
    max_queries_per_second=numbers,
    overage_vcpu_hour=st.none() | numbers,
    max_databases=st.none() | st.integers(0, 2**31),
    features=st.lists(texts, max_size=3).map(tuple),
)
targets = st.builds(
    Target,
    id=st.uuids(),
    name=texts,
    type=st.sampled_from(DatabaseType),
    pool_mode=st.sampled_from(PoolMode),
    dsn=texts.map(Secret),
)
tenants = st.builds(
    Tenant,
    id=st.uuids(),
    handle=st.just("org_a"),
    name=texts,
    tier=tiers,
    version=st.integers(0, 2**63 - 1),
    salt=secrets,
    keys=st.lists(
        st.builds(
            KeyVerifier, st.uuids(), texts, stored_key=secrets, server_key=secrets
        ),
        max_size=3,
    ).map(tuple),
    databases=st.dictionaries(texts, targets, max_size=3),
    limiter_mode=st.sampled_from(LimiterMode),
    max_wait=numbers,
    connections_override=st.none() | st.integers(0, 1000),
)


def entry(version: int = 7, record: Tenant | None = None) -> Entry:
    return Entry("org_a", version, 1e9, record)


def tenant() -> Tenant:
    tier = Tier("free", 5, 10, 1, False, 0, 5, 10, None, None, 1)
    return Tenant(uuid4(), "org_a", "A", tier, False, 7, b"salt")


@given(tenants)
def test_what_was_sealed_comes_out_as_it_was(record: Tenant) -> None:
    sealed = seal(VAULT, entry(record.version, record))
    assert unseal(VAULT, "org_a", sealed) == entry(record.version, record)


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
