"""Layer 3 through a running proxy: how many connections an organisation may hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import ACTOR, Organization, Proxy
from tests.fixtures.faults import RawClient, eventually
from tests.fixtures.wire import query

#: Connections that the free tier allows.
FREE = 5


@pytest.fixture
def free(proxy: Proxy) -> Organization:
    """An organisation of the free tier that may send as many queries as it likes."""
    return proxy.create_organization(tier="free", limiter=LimiterMode.OFF)


def may_connect(organization: Organization) -> bool:
    """Whether one more connection gets in; it is closed again."""
    try:
        organization.connect().close()
    except psycopg.OperationalError as error:
        assert "connection limit exceeded" in str(error)
        return False
    return True


@contextlib.contextmanager
def connections(
    organization: Organization, count: int
) -> Iterator[list[psycopg.Connection]]:
    """Hold `count` connections open."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(organization.connect()) for _ in range(count)]


def test_sixth_connection_of_the_free_tier_is_refused_with_tier_limit_and_count(
    free: Organization,
) -> None:
    with connections(free, FREE) as held:
        assert free.proxy.refusal(free.handle, free.key) == {
            "S": "FATAL",
            "V": "FATAL",
            "C": "53300",
            "M": "connection limit exceeded",
            "D": "tier=free limit=5 count=5",
            "H": "close connections you don't use, or upgrade for more",
        }
        for connection in held:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_connections_of_all_databases_count_together(free: Organization) -> None:
    names = ("app", "session", "transaction", "auto", "app")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(free.connect(name))
        refused = free.proxy.refusal(free.handle, free.key, "transaction")
    assert refused["C"] == "53300"


def test_place_is_free_again_when_a_client_says_goodbye(free: Organization) -> None:
    with connections(free, FREE) as held:
        assert not may_connect(free)
        held[2].close()
        eventually(lambda: may_connect(free), what="the place was not given back")


@pytest.mark.parametrize("statement", [None, "BEGIN", "SELECT pg_sleep(60)"])
def test_place_is_free_again_when_a_client_is_killed(
    free: Organization, statement: str | None
) -> None:
    victim = RawClient.logged_in(free)
    with connections(free, FREE - 1):
        assert not may_connect(free)
        if statement == "BEGIN":
            victim.query(statement)
        elif statement is not None:
            victim.send(query(statement))
        victim.reset()
        eventually(lambda: may_connect(free), what="the place was not given back")


def test_full_organization_keeps_nobody_else_out(
    free: Organization, proxy: Proxy
) -> None:
    other = proxy.create_organization(tier="free", limiter=LimiterMode.OFF)
    with connections(free, FREE), connections(other, FREE):
        assert not may_connect(free)
        assert not may_connect(other)


def test_clients_that_never_finish_their_login_take_no_place(
    free: Organization,
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3 * FREE):
            stranger = stack.enter_context(RawClient(free.proxy))
            stranger.start(free.handle, "app")
            assert stranger.receive()[0] == b"R"
        with connections(free, FREE):
            assert not may_connect(free)


@pytest.mark.parametrize(
    ("database", "settings", "sqlstate"),
    [
        ("nowhere", {}, "3D000"),
        ("app", {"options": "-c no_such_setting=1"}, "42704"),
        ("app", {"replication": "true"}, "42501"),
    ],
    ids=["unknown database", "bad setting", "replication"],
)
def test_logins_that_are_refused_take_no_place(
    free: Organization, database: str, settings: dict[str, str], sqlstate: str
) -> None:
    for _ in range(2 * FREE):
        refused = free.proxy.refusal(free.handle, free.key, database, **settings)
        assert refused["C"] == sqlstate
    with connections(free, FREE):
        assert not may_connect(free)


def test_wrong_keys_take_no_place(free: Organization) -> None:
    with connections(free, FREE - 1):
        for _ in range(FREE):
            assert free.proxy.refusal(free.handle, "ogk_wrong")["C"] == "28P01"
        with connections(free, 1):
            assert not may_connect(free)


def test_full_organization_does_not_tell_a_stranger_that_it_is_full(
    free: Organization,
) -> None:
    with connections(free, FREE):
        assert free.proxy.refusal(free.handle, "ogk_wrong")["C"] == "28P01"


def test_number_of_its_own_goes_before_the_tier(free: Organization) -> None:
    free.proxy.operate(
        lambda store: store.set_connections(free.handle, FREE + 2, actor=ACTOR)
    )
    with connections(free, FREE + 2):
        refused = free.proxy.refusal(free.handle, free.key)
    assert refused["D"] == "tier=free limit=7 count=7"
