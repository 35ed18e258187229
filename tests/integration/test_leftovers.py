"""What one session leaves on its server reaches no other, and none waits for ever.

The proxy has a single server, so that each client comes upon what the last one left.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode, PoolMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    SYNC,
    TERMINATE,
    Message,
    Wire,
    bind,
    execute,
    kinds,
    message,
    parse,
    query,
)

LATEST = (
    "SELECT query FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


@pytest.fixture(scope="module")
def single(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy with one server for each organisation."""
    settings = {
        "OGELPROXY_POOL_MAX_SERVERS": "1",
        "OGELPROXY_POOL_QUEUE_TIMEOUT": "3",
    }
    proxy = Proxy(postgres, tmp_path_factory.mktemp("single"), settings)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def tenant(single: Proxy) -> Organization:
    return single.create_organization(limiter=LimiterMode.OFF)


@pytest.fixture(params=[PoolMode.TRANSACTION, PoolMode.AUTO], ids=str)
def dsn(request: pytest.FixtureRequest, tenant: Organization) -> str:
    return tenant.dsn(str(request.param))


def values(answers: list[Message]) -> list[bytes]:
    """The first column of each row, which has one."""
    return [each.body[6:] for each in answers if each.kind == "D"]


def setting(wire: Wire, name: str) -> bytes:
    sql = f"SELECT coalesce(current_setting('{name}', true), '')"
    (value,) = values(wire.ask(query(sql)))
    return value


def test_a_client_that_sets_more_than_is_followed_leaves_none_of_it(dsn: str) -> None:
    with Wire(dsn) as one:
        one.ask(query(";".join(f"SET app.s{i} = 'one'" for i in range(70))))
        one.send(TERMINATE)
        one.rest()
    with Wire(dsn) as two:
        assert {setting(two, f"app.s{i}") for i in (0, 35, 69)} == {b""}


def test_more_than_is_followed_goes_with_the_transaction(tenant: Organization) -> None:
    dsn = tenant.dsn("transaction")
    with Wire(dsn) as one, Wire(dsn) as two:
        one.ask(query(";".join(f"SET app.s{i} = 'one'" for i in range(70))))
        assert {setting(two, f"app.s{i}") for i in (0, 35, 69)} == {b""}


@pytest.mark.parametrize(
    ("sql", "name"),
    [
        ("SET U&\"\\0061pp.user\" = 'one'", "app.user"),
        ("SELECT set_config('app.user'::text || 'x', 'one', false)", "app.userx"),
        ("SELECT set_config('app.' || 'user', 'one', false)", "app.user"),
        ("SET \"app.é\" = 'one'", "app.é"),
    ],
)
def test_a_setting_whose_name_is_hard_to_read_stays_with_its_session(
    dsn: str, sql: str, name: str
) -> None:
    with Wire(dsn) as one:
        one.ask(query("SET client_encoding = 'LATIN1'"))
        one.ask(message(b"Q", sql.encode("latin-1") + b"\0"))
        one.send(TERMINATE)
        one.rest()
    with Wire(dsn) as two:
        assert setting(two, name) == b""


def test_a_setting_too_long_to_be_read_ends_no_client(dsn: str) -> None:
    with Wire(dsn) as one:
        one.ask(query("SELECT set_config('app.x', repeat('one', 1000000), false)"))
        assert kinds(one.ask(query("SELECT 1"))) == "TDCZ"
        one.send(TERMINATE)
        one.rest()
    with Wire(dsn) as two:
        assert setting(two, "app.x") == b""


def test_session_authorization_takes_the_role_with_it(single: Proxy, dsn: str) -> None:
    role = single.postgres.create_role()
    with Wire(dsn) as one, Wire(dsn) as two:
        (user,) = values(one.ask(query("SELECT current_user")))
        single.postgres.execute(f'GRANT "{role}" TO "{user.decode()}"')
        one.ask(query(f'SET ROLE "{role}"'))
        two.ask(query("SELECT 1"))
        assert values(one.ask(query("SELECT current_user"))) == [role.encode()]
        one.ask(query("RESET session_authorization"))
        two.ask(query("SELECT 1"))
        assert values(one.ask(query("SELECT current_user"))) == [user]


def test_what_the_proxy_sets_itself_is_not_asked_for_again(
    tenant: Organization, dsn: str
) -> None:
    with Wire(dsn, {"timezone": "Asia/Tokyo"}) as one, Wire(dsn) as two:
        two.ask(query("SELECT 1"))
        one.ask(query("SELECT 'the last'"))
        with psycopg.connect(tenant.direct_dsn, autocommit=True) as direct:
            assert direct.execute(LATEST).fetchall() == [("SELECT 'the last'",)]


@pytest.mark.parametrize("is_extended", [False, True])
def test_a_goodbye_instead_of_the_data_of_a_copy_ends_both(
    dsn: str, is_extended: bool
) -> None:
    copy = "COPY t FROM STDIN"
    with Wire(dsn) as one:
        one.ask(query("CREATE TABLE t (x int)"))
        batch = parse(copy) + bind() + execute() + SYNC
        one.send((batch if is_extended else query(copy)) + TERMINATE)
        assert "C" not in kinds(one.rest())
    with Wire(dsn) as two:
        assert kinds(two.ask(query("SELECT 1"))) == "TDCZ"


def test_a_name_given_behind_deallocate_all_in_one_batch_stays(dsn: str) -> None:
    with Wire(dsn) as one:
        one.ask(parse("SELECT 0", "before") + SYNC)
        drop = parse("DEALLOCATE ALL") + bind() + execute()
        run = bind(name="behind") + execute()
        got = one.ask(drop + parse("SELECT 1", "behind") + run + SYNC)
        assert values(got) == [b"1"]
        assert values(one.ask(run + SYNC)) == [b"1"]
        assert kinds(one.ask(bind(name="before") + SYNC)) == "EZ"


def test_a_statement_that_can_not_be_prepared_again_fails_once(dsn: str) -> None:
    with Wire(dsn) as one, Wire(dsn) as two:
        two.ask(query("CREATE TABLE t (x int)"))
        one.ask(parse("SELECT * FROM t", "gone") + SYNC)
        one.ask(parse("SELECT 1", "kept") + SYNC)
        two.ask(query("DROP TABLE t"))
        # The server loses all that it had prepared.
        two.ask(query("DISCARD ALL"))
        assert kinds(one.ask(query("EXECUTE gone; EXECUTE kept"))) == "EZ"
        assert values(one.ask(query("EXECUTE kept"))) == [b"1"]
        got = one.ask(query("SELECT 2; EXECUTE gone; EXECUTE kept"))
        assert kinds(got) == "TDCEZ"
        assert values(one.ask(query("SELECT 3"))) == [b"3"]
