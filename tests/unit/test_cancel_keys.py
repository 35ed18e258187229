"""Cancel keys: the process ids that clients are told."""

from __future__ import annotations

from typing import cast

import pytest

from ogelproxy.cancel import Cancels
from ogelproxy.client import Client
from ogelproxy.config import MAX_WORKERS

#: Never looked into.
CLIENT = cast(Client, object())


@pytest.mark.parametrize("place", [None, 1, 2, MAX_WORKERS])
def test_process_ids_are_positive_and_fit_their_type(place: int | None) -> None:
    cancels = Cancels()
    cancels.place = place
    ids = [cancels.issue(CLIENT, 0)[0] for _ in range(2000)]
    assert len(set(ids)) == len(cancels) == 2000
    assert all(0 < each < 2**31 for each in ids)


def test_workers_of_a_machine_never_give_the_same() -> None:
    given = set()
    for place in range(1, MAX_WORKERS + 1):
        cancels = Cancels()
        cancels.place = place
        given |= {cancels.issue(CLIENT, 0)[0] % MAX_WORKERS for _ in range(20)}
        assert len(given) == place
