"""API keys: their form, their strength, and what may be shown of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.auth import apikey
from ogelproxy.errors import CredentialRejected
from ogelproxy.logs import mask


def test_a_new_key_is_well_formed_and_another_every_time() -> None:
    keys = {apikey.generate() for _ in range(100)}
    assert len(keys) == 100
    assert all(map(apikey.is_well_formed, keys))


def test_what_a_prefix_leaves_hidden_is_more_than_128_bits() -> None:
    hidden = apikey.SECRET_CHARACTERS - apikey.SHOWN_CHARACTERS
    assert hidden * math.log2(len(apikey.ALPHABET)) > 128


def test_a_prefix_tells_keys_apart_and_is_not_one() -> None:
    key = apikey.generate()
    assert key.startswith(apikey.prefix(key))
    assert len(apikey.prefix(key)) == 10
    assert not apikey.is_well_formed(apikey.prefix(key))


@given(st.text(max_size=50))
def test_nothing_is_shown_of_what_is_no_key(text: str) -> None:
    if not apikey.is_well_formed(text):
        with pytest.raises(CredentialRejected) as caught:
            apikey.prefix(text)
        assert str(caught.value) == "not an API key"


@pytest.mark.parametrize("end", ["\n", "x", "-"])
def test_a_key_ends_where_it_ends(end: str) -> None:
    assert not apikey.is_well_formed(apikey.generate() + end)


def test_the_log_masks_a_key() -> None:
    key = apikey.generate()
    assert key[4:] not in mask(f"login with {key} failed")
