"""The vault: what is encrypted is read again by each configured key, and no other."""

from __future__ import annotations

import base64
import functools
import hashlib

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, SecretUnreadable
from ogelproxy.tenants.vault import Vault

OLD = Fernet.generate_key().decode()
NEW = Fernet.generate_key().decode()
PASSPHRASE = "correct horse battery staple"


@functools.cache
def vault(*keys: str) -> Vault:
    return Vault(Secret(",".join(keys)))


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert vault(NEW).decrypt(vault(NEW).encrypt(Secret(text))) == Secret(text)


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    token = vault(OLD).encrypt(Secret("dsn"))
    assert vault(NEW, OLD).decrypt(token) == Secret("dsn")
    fresh = vault(NEW, OLD).encrypt(Secret("dsn"))
    assert vault(NEW).decrypt(fresh) == Secret("dsn")
    with pytest.raises(SecretUnreadable):
        vault(OLD).decrypt(fresh)


def test_a_rotated_token_needs_the_old_key_no_more() -> None:
    token = vault(NEW, OLD).rotate(vault(OLD).encrypt(Secret("dsn")))
    assert vault(NEW).decrypt(token) == Secret("dsn")
    with pytest.raises(SecretUnreadable):
        vault(NEW).rotate(vault(OLD).encrypt(Secret("dsn")))


def test_every_instance_derives_the_same_key_from_a_passphrase() -> None:
    token = Vault(Secret(PASSPHRASE)).encrypt(Secret("dsn"))
    assert Vault(Secret(f" {PASSPHRASE} ")).decrypt(token) == Secret("dsn")


def test_the_derivation_from_a_passphrase_never_changes() -> None:
    # Made when the vault was: whatever is stored must stay readable.
    token = (
        "gAAAAABrBB2sEZR84schpVOQI30iqB0HCMPIVppZds7vd4fwXJmRWDP1qM18JUG4xZEKb1IieaD9"
        "NvcptJ3rhwMaw76TTI4MPg=="
    )
    assert vault(PASSPHRASE).decrypt(token) == Secret("dsn")
    derived = hashlib.scrypt(
        PASSPHRASE.encode(), salt=b"ogelproxy.vault.1", n=2**14, r=8, p=1, dklen=32
    )
    key = base64.urlsafe_b64encode(derived).decode()
    assert vault(key).decrypt(token) == Secret("dsn")


@given(st.text(max_size=20), st.integers(0, 100))
def test_a_damaged_token_is_refused_or_still_says_the_same(
    text: str, position: int
) -> None:
    token = vault(NEW).encrypt(Secret("dsn"))
    damaged = token[:position] + text + token[position + len(text) :]
    try:
        # Base64 has characters that mean nothing, at its end and outside of it.
        assert vault(NEW).decrypt(damaged) == Secret("dsn")
    except SecretUnreadable:
        assert damaged != token


@pytest.mark.parametrize(
    "keys", ["", "short", f"{NEW},", f"{PASSPHRASE},fifteen letters"]
)
def test_a_weak_key_is_refused_without_being_quoted(keys: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        Vault(Secret(keys))
    assert "control.secret_key" in str(caught.value)
    assert not any(key in str(caught.value) for key in keys.split(",") if key)


def test_neither_repr_nor_errors_show_a_key() -> None:
    assert NEW not in repr(vault(NEW))
