"""Ledger: today's usage of each organisation as this process knows it.

A sink that keeps sums, not rows, so that tenants can be told what they used without
asking the control plane; what the open batch holds is added when somebody looks.
It begins anew with the process and at midnight (UTC); what is billed is elsewhere.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from ogelproxy._usage import UsageTable
from ogelproxy.usage.spool import Batch, Row, read_pairs

DAY = 86_400
#: Organisations kept; the one that used nothing for longest goes first.
MAX_ACCOUNTS = 2_000
#: Databases of one organisation that are told apart. Dropped ones count too.
MAX_DATABASES = 200
#: The slowest statements kept of one organisation; pruned at twice as many.
MAX_STATEMENTS = 50
#: Rows added before others get their turn in the loop: about a millisecond.
ROWS_AT_ONCE = 500

OTHER_DATABASES = "(other)"


@dataclass(slots=True)
class Total:
    """Sums over rows: of one database, or of one statement in one database."""

    database: str
    database_type: str
    fingerprint: int = 0  # of a statement
    queries: int = 0
    refused: int = 0
    errors: int = 0
    sqlstate: str = ""  # of the latest error
    rows: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    server_seconds: float = 0.0
    queue_seconds: float = 0.0
    throttled_seconds: float = 0.0
    vcpu_seconds: float = 0.0
    memory_gib_seconds: float = 0.0
    longest_seconds: float = 0.0
    first_at: float = 0.0  # Unix time
    last_at: float = 0.0  # Unix time

    def add(self, row: Row) -> None:
        """Add a row of the same database, or statement."""
        self.queries += row.queries
        self.refused += row.refused
        self.errors += row.errors
        self.sqlstate = row.sqlstate or self.sqlstate
        self.rows += row.rows
        self.bytes_in += row.bytes_in
        self.bytes_out += row.bytes_out
        self.server_seconds += row.server_seconds
        self.queue_seconds += row.queue_seconds
        self.throttled_seconds += row.throttled_seconds
        self.vcpu_seconds += row.vcpu_seconds
        self.memory_gib_seconds += row.memory_gib_seconds
        self.longest_seconds = max(self.longest_seconds, row.longest_seconds)
        self.first_at = min(self.first_at or row.first_at, row.first_at)
        self.last_at = max(self.last_at, row.last_at)


class Account:
    """One organisation's day."""

    def __init__(self, day: int) -> None:
        self.day = day  # since 1970, UTC
        self.databases: dict[tuple[str, str], Total] = {}  # by name and type
        self.statements: dict[tuple[str, int], Total] = {}  # by database, fingerprint

    def copy(self) -> Account:
        """Return an equal one to add to."""
        same = Account(self.day)
        same.databases = {key: replace(each) for key, each in self.databases.items()}
        same.statements = {key: replace(each) for key, each in self.statements.items()}
        return same

    def add(self, row: Row) -> None:
        """Add a row to its database and to its statement."""
        self.add_to_database(row)
        self.add_to_statement(row)
        if len(self.statements) >= 2 * MAX_STATEMENTS:
            self.statements = {
                (total.database, total.fingerprint): total
                for total in self.slowest(MAX_STATEMENTS)
            }

    def add_to_database(self, row: Row) -> None:
        key = (row.payer.database, row.payer.database_type)
        total = self.databases.get(key)
        if total is None:
            if len(self.databases) >= MAX_DATABASES:
                key = (OTHER_DATABASES, row.payer.database_type)
            total = self.databases.setdefault(key, Total(*key))
        total.add(row)

    def add_to_statement(self, row: Row) -> None:
        if row.fingerprint == 0 or row.queries == 0:
            return
        key = (row.payer.database, row.fingerprint)
        total = self.statements.get(key)
        if total is None:
            total = self.statements[key] = Total(
                row.payer.database, row.payer.database_type, row.fingerprint
            )
        total.add(row)

    def slowest(self, count: int) -> list[Total]:
        """Return the statements with the longest single run, the longest first."""
        return heapq.nlargest(
            count, self.statements.values(), key=lambda total: total.longest_seconds
        )


class Ledger:
    """The accounts of one process, beside the open batch of `table`."""

    def __init__(
        self, table: UsageTable, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._wall_clock = wall_clock
        # The order is that of the last use.
        self._accounts: OrderedDict[UUID, Account] = OrderedDict()

    def __len__(self) -> int:
        """Return how many organisations have an account."""
        return len(self._accounts)

    async def deliver(self, batch: Batch) -> None:
        """Add a closed batch."""
        for number, row in enumerate(batch.rows, 1):
            self._add(row)
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        while len(self._accounts) > MAX_ACCOUNTS:
            self._accounts.popitem(last=False)

    def _add(self, row: Row) -> None:
        org_id, day = row.payer.org_id, int(row.first_at // DAY)
        account = self._accounts.get(org_id)
        if account is None or account.day < day:
            account = self._accounts[org_id] = Account(day)
        if account.day == day:
            self._accounts.move_to_end(org_id)
            account.add(row)

    def databases(self, org_id: UUID) -> list[Total]:
        """Return what the organisation used today of each database, by name."""
        account = self._today(org_id)
        for row in read_pairs(self._table.sums(org_id.bytes)):
            account.add_to_database(row)
        return sorted(account.databases.values(), key=lambda total: total.database)

    def slowest(self, org_id: UUID, count: int) -> list[Total]:
        """Return the statements with the longest single run today, longest first.

        Of a statement that was not among the slowest for a while, what came before
        is forgotten.
        """
        account = self._today(org_id)
        for row in read_pairs(self._table.longest(org_id.bytes, count)):
            account.add_to_statement(row)
        return account.slowest(count)

    def _today(self, org_id: UUID) -> Account:
        today = int(self._wall_clock() // DAY)
        account = self._accounts.get(org_id)
        if account is None or account.day != today:
            return Account(today)
        return account.copy()
