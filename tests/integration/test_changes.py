"""Changes in the control plane reach connections that are open, within a second.

Each is made once as the operators' commands make it, by the store, and once by a
plain SQL statement that somebody types into psql.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from ogelproxy.config import Secret
from ogelproxy.tenants.model import DatabaseType, LimiterMode
from ogelproxy.tenants.store import Store
from tests.fixtures.engine import ACTOR, Organization, Proxy, create_key
from tests.fixtures.faults import eventually
from tests.fixtures.wire import Wire, kinds, query

#: Seconds in which a change takes effect (spec, layer 1).
PROMPT = 1.0

#: Changes an organisation.
Change = Callable[[Organization], None]


def typed(statement: LiteralString) -> Change:
    """A plain SQL statement, in which {handle} and {key} stand for their values."""

    def run(organization: Organization) -> None:
        proxy = organization.proxy
        proxy.postgres.execute(
            sql.SQL(statement).format(
                handle=sql.Literal(organization.handle),
                key=sql.Literal(organization.key_id),
            ),
            dbname=proxy.control,
        )

    return run


def suspend(organization: Organization) -> None:
    organization.proxy.operate(
        lambda store: store.suspend(organization.handle, actor=ACTOR)
    )


def revoke(organization: Organization) -> None:
    organization.proxy.operate(
        lambda store: store.revoke_key(
            organization.handle, organization.key_id, actor=ACTOR
        )
    )


def drop(organization: Organization) -> None:
    organization.proxy.operate(
        lambda store: store.drop_database(
            organization.handle, "transaction", actor=ACTOR
        )
    )


def move_up(organization: Organization) -> None:
    organization.proxy.operate(
        lambda store: store.set_tier(organization.handle, "starter", actor=ACTOR)
    )


def switch_off(organization: Organization) -> None:
    organization.proxy.operate(
        lambda store: store.set_limiter(
            organization.handle, LimiterMode.OFF, 0.0, actor=ACTOR
        )
    )


SUSPEND = (
    suspend,
    typed(
        "UPDATE platform.organizations SET status = 'suspended' WHERE handle = {handle}"
    ),
)
DELETE = typed("DELETE FROM platform.organizations WHERE handle = {handle}")
REVOKE = (
    revoke,
    typed("UPDATE platform.api_keys SET revoked_at = now() WHERE id = {key}"),
    typed("DELETE FROM platform.api_keys WHERE id = {key}"),
)
OF = "(SELECT id FROM platform.organizations WHERE handle = {handle})"
DROP = (
    drop,
    typed(
        "UPDATE platform.database_credentials SET is_active = false "
        f"WHERE name = 'transaction' AND org_id = {OF}"
    ),
    typed(
        "DELETE FROM platform.database_credentials "
        f"WHERE name = 'transaction' AND org_id = {OF}"
    ),
)
MOVE_UP = (
    move_up,
    typed("UPDATE platform.organizations SET tier = 'starter' WHERE handle = {handle}"),
)
SWITCH_OFF = (
    switch_off,
    typed(
        "UPDATE platform.organizations SET limiter_mode = 'off' WHERE handle = {handle}"
    ),
)


def ways(changes: tuple[Change, ...]) -> pytest.MarkDecorator:
    """Run a test for each way to make a change."""
    names = ["store", "UPDATE", "DELETE"][: len(changes)]
    return pytest.mark.parametrize("change", changes, ids=names)


@dataclass
class Ending:
    """How a connection ended."""

    fields: dict[str, str]
    seconds: float  # from the change to the end


def ending(wire: Wire, since: float) -> Ending:
    """Wait for the error that ends the connection, and the end."""
    errors = [each.fields() for each in wire.rest() if each.kind == "E"]
    assert len(errors) == 1
    return Ending(errors[0], time.monotonic() - since)


def is_alive(wire: Wire) -> bool:
    return "D" in [each.kind for each in wire.ask(query("SELECT 1"))]


@pytest.fixture
def busy(proxy: Proxy) -> Organization:
    """An organisation of the free tier whose limiter is off."""
    return proxy.create_organization(tier="free", limiter=LimiterMode.OFF)


@ways(SUSPEND)
def test_suspension_ends_idle_waiting_and_busy_connections(
    busy: Organization, organization: Organization, change: Change
) -> None:
    with (
        Wire(busy.dsn("app")) as idle,
        Wire(busy.dsn("transaction")) as in_transaction,
        Wire(busy.dsn("transaction")) as running,
        Wire(organization.dsn()) as bystander,
    ):
        in_transaction.ask(query("BEGIN"))
        running.send(query("SELECT pg_sleep(60)"))
        change(busy)
        since = time.monotonic()
        for wire in (idle, in_transaction, running):
            end = ending(wire, since)
            assert end.fields["S"] == "FATAL"
            assert end.fields["C"] == "57P04"
            assert end.fields["M"] == "organisation is suspended"
            assert end.seconds < PROMPT
        assert is_alive(bystander)
    assert busy.proxy.refusal(busy.handle, busy.key)["C"] == "57P04"


def test_deleted_organization_is_gone_and_then_unknown(busy: Organization) -> None:
    with Wire(busy.dsn()) as wire:
        DELETE(busy)
        since = time.monotonic()
        end = ending(wire, since)
    assert end.fields["C"] == "57P04"
    assert end.seconds < PROMPT
    assert busy.proxy.refusal(busy.handle, busy.key)["C"] == "28P01"


def test_resumed_organization_is_let_in_again(busy: Organization) -> None:
    def is_refused() -> bool:
        try:
            busy.connect().close()
        except psycopg.OperationalError as error:
            assert "organisation is suspended" in str(error)
            return True
        return False

    suspend(busy)
    eventually(is_refused, PROMPT)
    busy.proxy.operate(lambda store: store.resume(busy.handle, actor=ACTOR))
    eventually(lambda: not is_refused(), PROMPT)


@ways(REVOKE)
def test_revocation_ends_the_connections_of_that_key_only(
    busy: Organization, change: Change
) -> None:
    proxy = busy.proxy
    second, _ = proxy.operate(lambda store: create_key(store, busy.handle, "second"))
    # Until the proxy has heard of the second key.
    eventually(lambda: key_works(busy, second), PROMPT)
    with (
        Wire(busy.dsn()) as first_client,
        Wire(busy.dsn("transaction")) as other_first_client,
        Wire(busy.dsn(key=second)) as second_client,
    ):
        change(busy)
        since = time.monotonic()
        for wire in (first_client, other_first_client):
            end = ending(wire, since)
            assert end.fields["S"] == "FATAL"
            assert end.fields["C"] == "28P01"
            assert end.seconds < PROMPT
        assert is_alive(second_client)
        assert proxy.refusal(busy.handle, busy.key)["C"] == "28P01"
        assert key_works(busy, second)


def key_works(organization: Organization, key: str) -> bool:
    try:
        Wire(organization.dsn(key=key)).sock.close()
    except ConnectionRefusedError as refusal:
        assert refusal.args[0]["C"] == "28P01"
        return False
    return True


@ways(DROP)
def test_dropped_database_ends_its_connections_only(
    busy: Organization, change: Change
) -> None:
    with (
        Wire(busy.dsn("transaction")) as gone,
        Wire(busy.dsn("session")) as kept,
    ):
        assert is_alive(gone)
        change(busy)
        since = time.monotonic()
        end = ending(gone, since)
        assert end.fields["S"] == "FATAL"
        assert end.fields["C"] == "3D000"
        assert end.fields["M"] == 'database "transaction" does not exist'
        assert end.seconds < PROMPT
        assert is_alive(kept)
    assert busy.proxy.refusal(busy.handle, busy.key, "transaction")["C"] == "3D000"


def refused_detail(connection: psycopg.Connection, count: int) -> str | None:
    """Send up to `count` queries; return the DETAIL of the first that is refused."""
    for _ in range(count):
        try:
            connection.execute("SELECT 1")
        except psycopg.errors.ConfigurationLimitExceeded as error:
            return error.diag.message_detail
    return None


def is_refused_with(detail: str, connection: psycopg.Connection) -> bool:
    return refused_detail(connection, 200) == detail


@ways(MOVE_UP)
def test_new_tier_changes_the_limit_of_an_open_connection(
    proxy: Proxy, change: Change
) -> None:
    organization = proxy.create_organization(tier="free")
    with organization.connect("transaction") as connection:
        assert refused_detail(connection, 200) == "tier=free limit=10/s"
        change(organization)
        eventually(
            # More than the old tier would ever admit at once.
            lambda: refused_detail(connection, 2000) == "tier=starter limit=50/s",
            PROMPT,
        )


@ways(MOVE_UP)
def test_new_tier_changes_the_settings_of_an_open_connection(
    busy: Organization, change: Change
) -> None:
    with busy.connect("transaction") as connection:

        def timeout() -> object:
            row = connection.execute("SHOW statement_timeout").fetchone()
            assert row is not None
            return row[0]

        assert timeout() == "30s"
        change(busy)
        eventually(lambda: timeout() == "1min", PROMPT)


def test_new_tier_changes_how_many_connections_may_come(busy: Organization) -> None:
    wires = [Wire(busy.dsn()) for _ in range(5)]
    assert busy.proxy.refusal(busy.handle, busy.key)["C"] == "53300"
    move_up(busy)

    def is_admitted() -> bool:
        try:
            wires.append(Wire(busy.dsn()))
        except ConnectionRefusedError:
            return False
        return True

    try:
        eventually(is_admitted, PROMPT)
        assert all(map(is_alive, wires))
    finally:
        for wire in wires:
            wire.sock.close()


@ways(SWITCH_OFF)
def test_limiter_is_switched_off_on_an_open_connection(
    proxy: Proxy, change: Change
) -> None:
    organization = proxy.create_organization(tier="free")
    with organization.connect() as connection:
        assert refused_detail(connection, 200) is not None
        change(organization)
        eventually(lambda: refused_detail(connection, 50) is None, PROMPT)


@ways(SWITCH_OFF)
def test_query_that_waits_for_a_token_is_let_go_when_the_limiter_is_switched_off(
    proxy: Proxy, change: Change
) -> None:
    organization = proxy.create_organization(tier="starter", max_wait=60.0)
    full = query("SELECT 1;" * 250)  # all that the bucket holds: 5 s of the rate
    with Wire(organization.dsn("transaction")) as wire:
        assert "E" not in kinds(wire.ask(full))
        wire.send(full)
        change(organization)
        since = time.monotonic()
        assert kinds(wire.until("Z")).count("C") == 250
        assert time.monotonic() - since < PROMPT


def test_query_that_waits_for_a_token_is_refused_when_it_no_longer_may(
    proxy: Proxy,
) -> None:
    organization = proxy.create_organization(tier="starter", max_wait=60.0)
    full = query("SELECT 1;" * 250)
    with Wire(organization.dsn("transaction")) as wire:
        wire.ask(full)
        wire.send(full)
        proxy.operate(
            lambda store: store.set_limiter(
                organization.handle, LimiterMode.ENFORCE, 0.0, actor=ACTOR
            )
        )
        since = time.monotonic()
        refusal, _ = wire.until("Z")
        assert refusal.fields()["C"] == "53400"
        assert time.monotonic() - since < PROMPT


def test_changed_row_of_a_tier_reaches_all_who_have_it(proxy: Proxy) -> None:
    proxy.postgres.execute(
        "INSERT INTO platform.tier_limits (name, max_connections, "
        "max_queries_per_second, max_storage_gb, may_burst, monthly_fee, "
        "included_vcpu_hours, included_memory_gb_hours) "
        "VALUES ('changing', 5, 10, 1, false, 0, 1, 1)",
        dbname=proxy.control,
    )
    organizations = [proxy.create_organization(tier="changing") for _ in range(2)]
    with organizations[0].connect() as one, organizations[1].connect() as two:
        for connection in (one, two):
            assert refused_detail(connection, 200) == "tier=changing limit=10/s"
        proxy.postgres.execute(
            "UPDATE platform.tier_limits SET max_queries_per_second = 20 "
            "WHERE name = 'changing'",
            dbname=proxy.control,
        )
        for connection in (one, two):
            new = "tier=changing limit=20/s"
            eventually(partial(is_refused_with, new, connection), PROMPT)


def test_a_database_can_be_used_the_moment_it_was_made(proxy: Proxy) -> None:
    organization = proxy.create_organization(limiter=LimiterMode.OFF)
    dsn = Secret(organization.direct_dsn)
    with organization.connect():  # so that its record is in memory
        for name in ("first", "second", "third"):
            proxy.operate(
                partial(
                    Store.create_database,
                    handle=organization.handle,
                    name=name,
                    type=DatabaseType.POSTGRES,
                    dsn=dsn,
                    actor=ACTOR,
                )
            )
            with organization.connect(name) as connection:
                row = connection.execute("SELECT 1").fetchone()
            assert row == (1,)
