"""Framing: messages are cut where their lengths say, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy._wire import split
from ogelproxy.errors import ProtocolViolation
from tests import reference


@given(
    st.lists(st.tuples(st.sampled_from([b"D", b"C", b"Z"]), st.binary(max_size=40))),
    st.integers(0, 50),
)
def test_messages_are_cut_as_the_twin_cuts_them(
    messages: list[tuple[bytes, bytes]], missing: int
) -> None:
    data = b"".join(
        kind + (len(body) + 4).to_bytes(4, "big") + body for kind, body in messages
    )
    data = data[: max(len(data) - missing, 0)]
    assert split(data) == reference.cut(data)


@pytest.mark.parametrize("length", [0, 3, 2**31, 2**32 - 1])
def test_a_length_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(ProtocolViolation):
        split(b"D" + length.to_bytes(4, "big"))
