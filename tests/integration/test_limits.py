"""Layer 4 through a running proxy: how many queries an organisation may send.

The contract is that of the token bucket: within t seconds at most
capacity + rate * t, and the capacity at once. What was admitted is counted at the
client and by a sequence in the database, which shows what the server has run.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import LiteralString

import asyncpg
import psycopg
import pytest

from ogelproxy.tenants.model import LimiterMode
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import eventually, status
from tests.fixtures.postgres import Postgres
from tests.fixtures.wire import (
    SYNC,
    Message,
    Wire,
    bind,
    execute,
    kinds,
    parse,
    query,
)

#: The free tier: tokens per second, and what its bucket holds.
RATE = CAPACITY = 10
#: Of the tier `slow` below: a token takes so long that none comes by accident.
SLOW_CAPACITY = 5
BURST = 100

Refused = psycopg.errors.ConfigurationLimitExceeded
NEXT: LiteralString = "SELECT nextval('runs')"
HINT = re.compile(r"retry after (\d+\.\d\d) s")


class Stopwatch:
    """Check how many queries a bucket admitted since the watch was started."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def check(self, admitted: int) -> None:
        seconds = time.monotonic() - self.start
        assert CAPACITY <= admitted <= CAPACITY + RATE * seconds


@pytest.fixture
def free(proxy: Proxy) -> Organization:
    """An organisation of the free tier with a full bucket, a sequence and a table."""
    return with_tables(proxy.create_organization(tier="free"))


@pytest.fixture
def slow(proxy: Proxy) -> Organization:
    """The same with five tokens at once and one more a second."""
    add_slow_tier(proxy)
    return with_tables(proxy.create_organization(tier="slow"))


def add_slow_tier(proxy: Proxy) -> None:
    proxy.postgres.execute(
        "INSERT INTO platform.tier_limits (name, max_connections, "
        "max_queries_per_second, max_storage_gb, may_burst, monthly_fee, "
        "included_vcpu_hours, included_memory_gb_hours, max_databases) "
        "VALUES ('slow', 20, 1, 1, true, 0, 1, 1, 9) ON CONFLICT DO NOTHING",
        dbname=proxy.control,
    )


@pytest.fixture(scope="module")
def hasty_proxy(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy on which a query in a transaction waits next to nothing."""
    proxy = Proxy(
        postgres,
        tmp_path_factory.mktemp("hasty"),
        {"OGELPROXY_LIMITS_TRANSACTION_WAIT": "0.05"},
    )
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def hasty(hasty_proxy: Proxy) -> Organization:
    """An organisation of the tier `slow` on `hasty_proxy`."""
    add_slow_tier(hasty_proxy)
    return with_tables(hasty_proxy.create_organization(tier="slow"))


def with_tables(organization: Organization) -> Organization:
    with psycopg.connect(organization.direct_dsn) as connection:
        connection.execute("CREATE SEQUENCE runs")
        connection.execute("CREATE TABLE notes (note text)")
    return organization


def direct(organization: Organization, statement: LiteralString) -> int:
    """Ask the database without the proxy."""
    with psycopg.connect(organization.direct_dsn) as connection:
        row = connection.execute(statement).fetchone()
    assert row is not None
    return int(row[0])


def runs(organization: Organization) -> int:
    """How often the server has run NEXT."""
    return direct(
        organization, "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM runs"
    )


def wait_as_told(hint: str | None) -> None:
    """Wait until the refused query may be tried again."""
    told = HINT.match(hint or "")
    assert told is not None, hint
    time.sleep(float(told[1]))


def use_up(connection: psycopg.Connection) -> Refused:
    """Send queries until one is refused; return its error."""
    for _ in range(BURST):
        try:
            connection.execute("SELECT 1")
        except Refused as error:
            return error
    raise AssertionError("nothing was refused")


# A burst, in every form of query.


def simple(organization: Organization, count: int) -> int:
    return psycopg_burst(organization, count, prepare=None)


def prepared(organization: Organization, count: int) -> int:
    return psycopg_burst(organization, count, prepare=True)


def psycopg_burst(organization: Organization, count: int, prepare: bool | None) -> int:
    """Spread `count` queries over a second; return how many were admitted."""
    admitted = 0
    parameters = None if prepare is None else ()
    with organization.connect("transaction") as connection:
        start = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, start + number / count - time.monotonic()))
            try:
                connection.execute(NEXT, parameters, prepare=prepare)
            except Refused:
                continue
            admitted += 1
        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    return admitted


def asyncpg_burst(organization: Organization, count: int) -> int:
    async def run() -> int:
        admitted = 0
        connection = await asyncpg.connect(organization.dsn("auto"))
        for number in range(count):
            try:
                await connection.fetchval("SELECT nextval('runs') + $1::int", number)
            except asyncpg.ConfigurationLimitExceededError:
                continue
            admitted += 1
        await connection.close()
        return admitted

    return asyncio.run(run())


def syncs(organization: Organization, count: int) -> int:
    """Pipeline `count` batches of one query each."""
    with Wire(organization.dsn("transaction")) as wire:
        wire.send((parse(NEXT) + bind() + execute() + SYNC) * count)
        answers = wire.until("Z" * count)
    # Each is answered in its turn, by its result or by one refusal.
    shape = kinds(answers)
    assert re.fullmatch("((12D?)?[CE]Z)+", shape), shape
    return shape.count("C")


def queries(organization: Organization, count: int) -> int:
    """Pipeline `count` simple queries."""
    with Wire(organization.dsn("transaction")) as wire:
        wire.send(query(NEXT) * count)
        answers = wire.until("Z" * count)
    shape = kinds(answers)
    assert re.fullmatch("(TDCZ|EZ)+", shape), shape
    return shape.count("C")


@pytest.mark.parametrize("burst", [simple, prepared, asyncpg_burst, syncs, queries])
def test_burst_is_admitted_up_to_the_bucket_and_the_rest_never_reaches_the_server(
    free: Organization, burst: Callable[[Organization, int], int]
) -> None:
    watch = Stopwatch()
    admitted = burst(free, BURST)
    watch.check(admitted)
    assert runs(free) == admitted


def test_refusal_says_tier_limit_and_when_to_come_back(free: Organization) -> None:
    with free.connect() as connection:
        error = use_up(connection)
        assert error.diag.severity_nonlocalized == "ERROR"
        assert error.sqlstate == "53400"
        assert error.diag.message_primary == "query rate limit exceeded"
        assert error.diag.message_detail == "tier=free limit=10/s"
        assert HINT.fullmatch(error.diag.message_hint or "")


@pytest.mark.parametrize("prepare", [None, True])
def test_connection_works_again_when_it_has_waited_as_the_hint_says(
    free: Organization, prepare: bool | None
) -> None:
    with free.connect("transaction") as connection:
        for _ in range(3):
            error = use_up(connection)
            wait_as_told(error.diag.message_hint)
            assert connection.execute("SELECT 42", prepare=prepare).fetchone() == (42,)


def test_who_meets_the_limit_often_is_told_to_upgrade(free: Organization) -> None:
    with free.connect() as connection:
        hints = []
        for _ in range(BURST):
            try:
                connection.execute("SELECT 1")
            except Refused as error:
                hints.append(error.diag.message_hint or "")
    is_prompted = ["upgrade" in hint for hint in hints]
    assert is_prompted == [False] * 4 + [True] * (len(hints) - 4)
    assert all(HINT.match(hint) for hint in hints)


def test_two_connections_of_an_organization_share_one_bucket(
    free: Organization,
) -> None:
    admitted = 0
    with free.connect("session") as one, free.connect("transaction") as two:
        watch = Stopwatch()
        for _ in range(BURST // 2):
            for connection in (one, two):
                with contextlib.suppress(Refused):
                    connection.execute(NEXT)
                    admitted += 1
        watch.check(admitted)
    assert runs(free) == admitted


def test_one_organization_in_need_costs_another_nothing(
    free: Organization, proxy: Proxy
) -> None:
    other = proxy.create_organization(tier="free")
    with free.connect() as poor, other.connect() as rich:
        use_up(poor)
        for _ in range(CAPACITY):
            rich.execute("SELECT 1")


# Batches: many queries in front of one Sync.


def test_batch_with_a_refused_query_is_rolled_back_whole(free: Organization) -> None:
    insert = parse("INSERT INTO notes VALUES ('x')") + bind() + execute()
    with Wire(free.dsn("transaction")) as wire:
        answers = wire.ask(insert * (3 * CAPACITY), SYNC)
        done = kinds(answers).count("C")
        assert done >= CAPACITY
        assert re.fullmatch("(12C)+(12)?EZ", kinds(answers))
        assert answers[-2].fields()["C"] == "53400"
        assert answers[-1].body == b"I"
        assert direct(free, "SELECT count(*) FROM notes") == 0
        wait_as_told(answers[-2].fields()["H"])
        assert kinds(wire.ask(insert, SYNC)) == "12CZ"
    assert direct(free, "SELECT count(*) FROM notes") == 1


def test_batch_behind_a_refused_one_is_answered_on_its_own(
    slow: Organization,
) -> None:
    run = parse(NEXT) + bind() + execute()
    rollback = parse("ROLLBACK") + bind() + execute()
    with Wire(slow.dsn("transaction")) as wire:
        wire.send(run * SLOW_CAPACITY + SYNC + run * 2 + SYNC + rollback + SYNC)
        answers = wire.until("ZZZ")
    assert re.fullmatch("(12DC){5}Z(12)?EZ12N?CZ", kinds(answers))
    assert runs(slow) == SLOW_CAPACITY


def test_psycopg_pipeline_ends_with_the_refusal_and_can_go_on(
    slow: Organization,
) -> None:
    with slow.connect("transaction") as connection:
        with pytest.raises(Refused) as caught, connection.pipeline():
            for _ in range(2 * SLOW_CAPACITY):
                connection.execute("INSERT INTO notes VALUES (%s)", ["x"])
        assert direct(slow, "SELECT count(*) FROM notes") == 0
        wait_as_told(caught.value.diag.message_hint)
        with connection.pipeline():
            connection.execute("INSERT INTO notes VALUES (%s)", ["y"])
    assert direct(slow, "SELECT count(*) FROM notes") == 1


def test_parse_bind_and_describe_without_execute_are_free(slow: Organization) -> None:
    with Wire(slow.dsn("transaction")) as wire:
        for _ in range(4 * SLOW_CAPACITY):
            assert kinds(wire.ask(parse(NEXT), bind(), SYNC)) == "12Z"
        for _ in range(SLOW_CAPACITY):
            assert kinds(wire.ask(parse(NEXT), bind(), execute(), SYNC)) == "12DCZ"


# Messages of several statements.

#: Ten statements for Postgres, whatever the semicolons look like.
TEN = """\
SELECT nextval('runs'); ; ;
SELECT ';;;;;;;;;;;;', E'\\';;;;;;', U&';;;;'; -- ;;;;;;;;;;;;;
/* ;;;;; /* ;;;;; */ ;;;;; */ SELECT 3;
SELECT $$;;;;;;$$, $tag$;;;;$$;;;$tag$;
SELECT 5 AS ";;;;;;;""; ;";
SELECT 6
;
SELECT nextval('runs');
SELECT 8; SELECT 9; SELECT ';' || nextval('runs') -- ;;;"""


def test_as_many_statements_as_the_bucket_holds_pass_in_one_message(
    free: Organization,
) -> None:
    with Wire(free.dsn("transaction")) as wire:
        answers = wire.ask(query(TEN))
    assert kinds(answers).count("C") == CAPACITY
    assert "E" not in kinds(answers)
    assert runs(free) == 3


@pytest.mark.parametrize("size", [0, 300_000], ids=["short", "longer than a read"])
def test_message_of_more_statements_than_the_bucket_holds_runs_nothing(
    free: Organization, size: int
) -> None:
    message = query(f"/*{'x' * size}*/ {TEN}\n; SELECT 11")
    with Wire(free.dsn("transaction")) as wire:
        # Twice: it was not only for lack of tokens at that moment.
        for _ in range(2):
            answers = wire.ask(message)
            assert kinds(answers) == "EZ"
            fields = answers[0].fields()
            assert (fields["S"], fields["C"]) == ("ERROR", "53400")
            assert fields["H"] == "send at most 10 statements per message"
        assert kinds(wire.ask(query("SELECT 1"))) == "TDCZ"
    assert runs(free) == 0


def test_message_that_is_not_kept_whole_runs_nothing_either(
    free: Organization,
) -> None:
    # Passed on while it is read: what is found too late costs the connection.
    message = query(f"/*{'x' * 3_000_000}*/ {TEN}\n; SELECT 11")
    with Wire(free.dsn("transaction")) as wire:
        wire.send(message)
        (refusal,) = wire.rest()
        assert refusal.kind == "E"
        assert refusal.fields()["S"] == "FATAL"
        assert refusal.fields()["C"] == "53400"
        assert refusal.fields()["D"] == "tier=free limit=10/s"
        # One token is paid at the beginning of the message, ten are missing.
        assert HINT.fullmatch(refusal.fields()["H"])
        assert refusal.fields()["H"] > "retry after 0.05 s"
    with Wire(free.dsn("transaction")) as wire:
        assert "E" not in kinds(wire.ask(query("SELECT 1")))
    assert runs(free) == 0


def test_end_of_a_transaction_is_free_in_a_message_of_several(
    free: Organization,
) -> None:
    with Wire(free.dsn("transaction")) as wire:
        most = "SELECT 1;" * (CAPACITY - 1)
        answers = wire.ask(query(f"BEGIN; {most} COMMIT; ROLLBACK; END; ABORT"))
        assert "E" not in kinds(answers)
        answers = wire.ask(query(f"BEGIN; {most} SELECT 1; COMMIT"))
        assert kinds(answers) == "EZ"


# Transactions.


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK", "END", "ABORT"])
@pytest.mark.parametrize("is_extended", [False, True], ids=["simple", "extended"])
def test_transaction_can_always_be_left(
    hasty: Organization, ending: str, is_extended: bool
) -> None:
    with Wire(hasty.dsn("transaction")) as wire, hasty.connect() as other:
        wire.ask(query("BEGIN"))
        wire.ask(query("INSERT INTO notes VALUES ('x')"))
        use_up(other)
        answers = (
            wire.ask(parse(ending), bind(), execute(), SYNC)
            if is_extended
            else wire.ask(query(ending))
        )
        assert "E" not in kinds(answers)
        assert answers[-1].body == b"I"
    kept = ending in ("COMMIT", "END")
    assert direct(hasty, "SELECT count(*) FROM notes") == kept


@pytest.mark.parametrize("prepare", [None, True], ids=["simple", "prepared"])
def test_queries_in_a_transaction_wait_instead_of_failing(
    free: Organization, prepare: bool | None
) -> None:
    with free.connect("transaction") as connection:
        watch = Stopwatch()
        with connection.transaction():
            for _ in range(CAPACITY + 4):
                connection.execute("INSERT INTO notes VALUES ('x')", prepare=prepare)
        watch.check(1 + CAPACITY + 4)  # BEGIN is one too
    assert direct(free, "SELECT count(*) FROM notes") == CAPACITY + 4


def test_pipeline_in_a_transaction_waits_instead_of_failing(
    free: Organization,
) -> None:
    with Wire(free.dsn("transaction")) as wire:
        watch = Stopwatch()
        wire.ask(query("BEGIN"))
        insert = parse("INSERT INTO notes VALUES ('x')") + bind() + execute()
        answers = wire.ask(insert * (CAPACITY + 4), SYNC)
        assert kinds(answers) == "12C" * (CAPACITY + 4) + "Z"
        watch.check(1 + CAPACITY + 4)
        assert answers[-1].body == b"T"
        wire.ask(query("COMMIT"))
    assert direct(free, "SELECT count(*) FROM notes") == CAPACITY + 4


def fail_transaction(wire: Wire, is_extended: bool) -> list[Message]:
    """Send queries in an open transaction up to the one that is refused."""
    for _ in range(BURST):
        answers = (
            wire.ask(parse(NEXT), bind(), execute(), SYNC)
            if is_extended
            else wire.ask(query(NEXT))
        )
        if "E" in kinds(answers):
            return answers
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("is_extended", [False, True], ids=["simple", "extended"])
def test_transaction_with_a_refused_query_fails_as_in_postgres(
    hasty: Organization, is_extended: bool
) -> None:
    with Wire(hasty.dsn("transaction")) as wire:
        wire.ask(query("BEGIN"))
        wire.ask(query("LOCK TABLE notes"))
        answers = fail_transaction(wire, is_extended)
        assert kinds(answers) == ("12EZ" if is_extended else "EZ")
        refusal = answers[-2].fields()
        assert (refusal["S"], refusal["C"]) == ("ERROR", "53400")
        assert refusal["D"] == "tier=slow limit=1/s"
        assert answers[-1].body == b"E"
        # The server knows it too: what it held is let go.
        with psycopg.connect(hasty.direct_dsn) as connection:
            connection.execute("LOCK TABLE notes NOWAIT")
        wait_as_told(refusal["H"])
        answers = wire.ask(query("SELECT 1"))
        assert kinds(answers) == "EZ"
        assert answers[0].fields()["C"] == "25P02"
        assert answers[-1].body == b"E"
        answers = wire.ask(query("COMMIT"))
        assert [each.body for each in answers] == [b"ROLLBACK\0", b"I"]
        assert runs(hasty) == SLOW_CAPACITY - 2


@pytest.mark.parametrize("is_extended", [False, True], ids=["simple", "extended"])
def test_refused_query_is_forgotten_by_a_savepoint(
    hasty: Organization, is_extended: bool
) -> None:
    with Wire(hasty.dsn("transaction")) as wire:
        wire.ask(query("BEGIN"))
        wire.ask(query("INSERT INTO notes VALUES ('kept')"))
        wire.ask(query("SAVEPOINT here"))
        assert fail_transaction(wire, is_extended)[-1].body == b"E"
        answers = wire.ask(query("ROLLBACK TO SAVEPOINT here"))
        assert [each.body for each in answers] == [b"ROLLBACK\0", b"T"]
        answers = wire.ask(query("COMMIT"))
        assert [each.body for each in answers] == [b"COMMIT\0", b"I"]
    assert direct(hasty, "SELECT count(*) FROM notes") == 1


def test_transaction_that_failed_is_the_matter_of_its_own_connection(
    hasty: Organization,
) -> None:
    with Wire(hasty.dsn("transaction")) as wire:
        wire.ask(query("BEGIN"))
        refusal = fail_transaction(wire, is_extended=False)[-2].fields()
        wire.ask(query("ROLLBACK"))
        wait_as_told(refusal["H"])
        answers = wire.ask(query(NEXT))
        assert kinds(answers) == "TDCZ"
        assert answers[-1].body == b"I"


# Modes and waiting.


def test_warn_mode_runs_the_query_and_gives_a_notice(proxy: Proxy) -> None:
    organization = with_tables(
        proxy.create_organization(tier="free", limiter=LimiterMode.WARN)
    )
    notices: list[tuple[str | None, ...]] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        # Read now: its memory is libpq's.
        fields = (notice.severity, notice.sqlstate, notice.message_detail)
        notices.append(fields)

    with organization.connect("transaction") as connection:
        connection.add_notice_handler(note)
        watch = Stopwatch()
        for number in range(BURST):
            connection.execute(NEXT, prepare=number % 2 == 0)
        watch.check(BURST - len(notices))
    assert runs(organization) == BURST
    assert set(notices) == {("NOTICE", "53400", "tier=free limit=10/s")}


def test_notice_of_a_batch_stands_before_it_is_ready(proxy: Proxy) -> None:
    organization = with_tables(
        proxy.create_organization(tier="free", limiter=LimiterMode.WARN)
    )
    run = parse(NEXT) + bind() + execute()
    with Wire(organization.dsn("transaction")) as wire:
        answers = wire.ask(run * BURST, SYNC)
    assert kinds(answers).replace("N", "") == "12DC" * BURST + "Z"
    assert "N" in kinds(answers)
    assert runs(organization) == BURST


def test_limiter_that_is_off_lets_all_pass_in_silence(proxy: Proxy) -> None:
    organization = with_tables(
        proxy.create_organization(tier="free", limiter=LimiterMode.OFF)
    )
    run = parse(NEXT) + bind() + execute()
    with Wire(organization.dsn("transaction")) as wire:
        assert kinds(wire.ask(run * BURST, SYNC)) == "12DC" * BURST + "Z"
        wire.send(query(NEXT) * BURST)
        assert kinds(wire.until("Z" * BURST)) == "TDCZ" * BURST
        assert "E" not in kinds(wire.ask(query("SELECT 1;" * BURST)))


@pytest.mark.parametrize("database", ["session", "transaction"])
@pytest.mark.parametrize("prepare", [None, True], ids=["simple", "prepared"])
def test_queries_that_may_wait_are_delayed_and_succeed(
    proxy: Proxy, database: str, prepare: bool | None
) -> None:
    organization = with_tables(proxy.create_organization(tier="free", max_wait=30.0))
    each, connections = 4, 4
    watch = Stopwatch()

    def run() -> None:
        with organization.connect(database) as connection:
            for _ in range(each):
                connection.execute(NEXT, prepare=prepare)

    threads = [threading.Thread(target=run) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.check(each * connections)
    assert runs(organization) == each * connections


def test_query_that_would_wait_longer_than_it_may_is_refused_at_once(
    proxy: Proxy,
) -> None:
    add_slow_tier(proxy)
    organization = with_tables(proxy.create_organization(tier="slow", max_wait=0.2))
    with organization.connect() as connection:
        error = use_up(connection)
        wait_as_told(error.diag.message_hint)
        connection.execute(NEXT)


def test_query_of_a_client_that_went_while_it_waited_is_not_run(proxy: Proxy) -> None:
    organization = with_tables(proxy.create_organization(tier="free", max_wait=30.0))
    with Wire(organization.dsn("transaction")) as leaving:
        leaving.send(query(NEXT) * (CAPACITY + 20))
        leaving.until("Z" * CAPACITY)
    eventually(lambda: status(organization)["clients"] == 0)
    before = runs(organization)
    assert before < CAPACITY + 20
    with organization.connect("transaction") as connection:
        for _ in range(5):
            connection.execute("SELECT 1")
    assert runs(organization) == before


# Usage.


def test_usage_counts_refusals_apart(free: Organization) -> None:
    admitted = queries(free, BURST)
    proxy = free.proxy

    def counted() -> tuple[int, int, int]:
        dsn = proxy.postgres.dsn(proxy.control)
        with psycopg.connect(dsn) as connection:
            row = connection.execute(
                "SELECT coalesce(sum(h.queries), 0)::int, "
                "coalesce(sum(h.refused), 0)::int, "
                "coalesce(max(u.query_count), 0)::int "
                "FROM platform.usage_history h "
                "JOIN platform.usage_metrics u USING (org_id) WHERE h.handle = %s",
                [free.handle],
            ).fetchone()
        assert row is not None
        return row

    eventually(lambda: sum(counted()[:2]) == BURST, what="usage did not arrive")
    assert counted() == (admitted, BURST - admitted, admitted)


def test_time_that_queries_waited_for_tokens_is_counted(proxy: Proxy) -> None:
    organization = with_tables(proxy.create_organization(tier="free", max_wait=30.0))
    assert queries(organization, CAPACITY + 3) == CAPACITY + 3

    def throttled() -> tuple[int, float]:
        dsn = proxy.postgres.dsn(proxy.control)
        with psycopg.connect(dsn) as connection:
            row = connection.execute(
                "SELECT coalesce(sum(queries), 0)::int, "
                "coalesce(sum(throttled_seconds), 0) "
                "FROM platform.usage_history WHERE handle = %s",
                [organization.handle],
            ).fetchone()
        assert row is not None
        return row

    eventually(lambda: throttled()[0] == CAPACITY + 3, what="usage did not arrive")
    assert throttled()[1] > 0
