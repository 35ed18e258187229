"""The ledger: sums of closed batches and of the open one, by organisation and day."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.usage import ledger as ledger_module
from ogelproxy.usage.ledger import DAY, MAX_DATABASES, MAX_STATEMENTS, Ledger
from ogelproxy.usage.spool import Batch, Payer, Row, Spool

ORG, OTHER = UUID(int=1), UUID(int=2)
NOON = 20_000 * DAY + DAY / 2  # Unix time


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


class Desk:
    """A table with an open batch, and the ledger beside it."""

    def __init__(self, directory: Path) -> None:
        self.table = UsageTable(256)
        self.spool = Spool(directory, 1 << 26, self.table.file_bytes)
        self.spool.open()
        self.table.rotate(self.spool.open_batch())
        self.clock = Clock()
        self.ledger = Ledger(self.table, self.clock)

    def payer(
        self, org: UUID = ORG, database: str = "app", app: str = ""
    ) -> Attribution:
        return Attribution(
            self.table,
            org.bytes,
            handle="org_a",
            database=database,
            database_type="postgres",
            tier="free",
            application_name=app,
            work_mem_bytes=0,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.table.close()
    desk.spool.close()


def row(number: int = 1, at: float = NOON, **fields: object) -> Row:
    given = {"database": "app", "org_id": ORG} | fields
    return Row(
        slot=number,
        payer=Payer(
            given["org_id"],  # type: ignore[arg-type]
            "org_a",
            "free",
            "postgres",
            str(given["database"]),
            "",
        ),
        fingerprint=number,
        queries=1,
        refused=0,
        errors=0,
        sqlstate="",
        rows=2,
        bytes_in=3,
        bytes_out=4,
        server_seconds=0.5,
        queue_seconds=0.25,
        throttled_seconds=0.125,
        vcpu_seconds=1.0,
        memory_gib_seconds=2.0,
        longest_seconds=float(number),
        first_at=at,
        last_at=at + 1,
    )


def batch(*rows: Row) -> Batch:
    return Batch(UUID(int=9), 1, NOON, rows)


def test_the_open_batch_is_summed_over_payers_of_one_organisation(desk: Desk) -> None:
    mine = [desk.payer(app=name) for name in ("a", "b")]
    elsewhere, theirs = desk.payer(database="other"), desk.payer(OTHER)
    for who in (*mine, *mine, elsewhere, theirs):
        desk.table.record(who, fingerprint=1, rows=5, bytes_in=7, server_seconds=0.25)
    desk.table.record(mine[0], fingerprint=2, refused=3, queries=0)
    app, other = desk.ledger.databases(ORG)
    assert (app.database, app.queries, app.refused, app.rows) == ("app", 4, 3, 20)
    assert (app.bytes_in, app.server_seconds) == (28, 1.0)
    assert (other.database, other.queries) == ("other", 1)
    assert app.first_at <= app.last_at
    (only,) = desk.ledger.databases(OTHER)
    assert only.queries == 1


def test_the_longest_rows_of_the_open_batch_come_first(desk: Desk) -> None:
    mine, theirs = desk.payer(), desk.payer(OTHER)
    for number in range(1, 9):
        desk.table.record(mine, fingerprint=number, server_seconds=number)
    desk.table.record(theirs, fingerprint=99, server_seconds=99)
    found = desk.table.longest(ORG.bytes, 3)
    assert len(found) == 3
    slowest = desk.ledger.slowest(ORG, 3)
    assert [total.fingerprint for total in slowest] == [8, 7, 6]


def test_a_table_without_a_batch_has_nothing(tmp_path: Path) -> None:
    table = UsageTable(256)
    assert table.sums(ORG.bytes) == table.longest(ORG.bytes, 5) == []
    with pytest.raises(ValueError):
        table.sums(b"short")


async def test_closed_batches_add_up_with_the_open_one(desk: Desk) -> None:
    await desk.ledger.deliver(batch(row(1), row(2)))
    await desk.ledger.deliver(batch(row(1)))
    desk.table.record(desk.payer(), fingerprint=1, rows=2, server_seconds=0.5)
    (app,) = desk.ledger.databases(ORG)
    assert (app.queries, app.rows, app.server_seconds) == (4, 8, 2.0)
    longest, other = desk.ledger.slowest(ORG, 9)
    assert (longest.fingerprint, longest.queries) == (2, 1)
    assert (other.fingerprint, other.queries) == (1, 3)
    # Looking changes nothing.
    assert desk.ledger.databases(ORG) == [app]


async def test_a_new_day_begins_anew_and_a_late_row_is_left_out(desk: Desk) -> None:
    await desk.ledger.deliver(batch(row(1)))
    desk.clock.now = NOON + DAY
    assert desk.ledger.databases(ORG) == []
    assert desk.ledger.slowest(ORG, 5) == []
    await desk.ledger.deliver(batch(row(2, NOON + DAY), row(1)))
    (app,) = desk.ledger.databases(ORG)
    assert app.queries == 1


async def test_an_account_is_bounded(desk: Desk) -> None:
    count = 3 * MAX_STATEMENTS
    await desk.ledger.deliver(
        batch(*(row(number, database=f"db{number}") for number in range(1, count + 1)))
    )
    slowest = desk.ledger.slowest(ORG, count)
    assert len(slowest) < 2 * MAX_STATEMENTS
    assert [each.fingerprint for each in slowest[:10]] == [
        *range(count, count - 10, -1)
    ]
    many = (row(1, database=f"more{number}") for number in range(MAX_DATABASES))
    await desk.ledger.deliver(batch(*many))
    databases = desk.ledger.databases(ORG)
    assert len(databases) == MAX_DATABASES + 1
    assert sum(each.queries for each in databases) == count + MAX_DATABASES


async def test_accounts_are_bounded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_ACCOUNTS", 3)
    for number in (1, 2, 3, 1, 4):
        await desk.ledger.deliver(batch(row(1, org_id=UUID(int=number))))
    assert len(desk.ledger) == 3
    assert desk.ledger.databases(UUID(int=2)) == []
    assert desk.ledger.databases(UUID(int=1))
