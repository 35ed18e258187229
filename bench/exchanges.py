"""Exchanges: what drivers and Postgres say to each other for one query, in bytes.

As `pgbench -S` says it in each of its protocols, and what long results are like.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fixtures.wire import (
    bind,
    copy_data,
    describe_portal,
    execute,
    message,
    parse,
    query,
)

POINT_QUERY = "SELECT abalance FROM pgbench_accounts WHERE aid = $1"
#: Bytes of a row of a long result.
ROW_BYTES = 100

#: As `_replies.pxd` numbers them.
PARSE, BIND, DESCRIBE, EXECUTE, REPLY_TO_SYNC, QUERY = 1, 2, 4, 5, 6, 7


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is sent at once, what of it is replied to (ASKED_), and the answer."""

    request: bytes
    asked: bytes
    answer: bytes


def _row(size: int) -> bytes:
    """A DataRow of one column."""
    return message(b"D", b"\0\1" + size.to_bytes(4, "big") + b"x" * size)


def _complete(rows: int) -> bytes:
    return message(b"C", b"SELECT %d\0" % rows)


SYNC = message(b"S")
READY = message(b"Z", b"I")
PARSED, BOUND = message(b"1"), message(b"2")
#: One int4: `abalance` of `pgbench_accounts`.
COLUMNS = message(
    b"T",
    b"\0\1abalance\0" + bytes.fromhex("00004006 0003 00000017 0004 ffffffff 0000"),
)
ROW = _row(1)

#: By protocol, as pgbench's --protocol names them.
POINT = {
    "simple": Exchange(
        query(POINT_QUERY.replace("$1", "65536")),
        bytes([QUERY]),
        COLUMNS + ROW + _complete(1) + READY,
    ),
    "extended": Exchange(
        parse(POINT_QUERY) + bind([b"65536"]) + describe_portal() + execute() + SYNC,
        bytes([PARSE, BIND, DESCRIBE, EXECUTE, REPLY_TO_SYNC]),
        PARSED + BOUND + COLUMNS + ROW + _complete(1) + READY,
    ),
    "prepared": Exchange(
        bind([b"65536"], "P0_1") + describe_portal() + execute() + SYNC,
        bytes([BIND, DESCRIBE, EXECUTE, REPLY_TO_SYNC]),
        BOUND + COLUMNS + ROW + _complete(1) + READY,
    ),
}
#: What makes the statement of "prepared".
PREPARE = Exchange(
    parse(POINT_QUERY, "P0_1") + SYNC,
    bytes([PARSE, REPLY_TO_SYNC]),
    PARSED + READY,
)


def long_answer(rows: int) -> Exchange:
    """A query in the simple protocol that is answered with many rows."""
    answer = COLUMNS + _row(ROW_BYTES) * rows + _complete(rows) + READY
    return Exchange(query("TABLE items"), bytes([QUERY]), answer)


def copied(rows: int) -> bytes:
    """Rows of a COPY IN, a message each."""
    return copy_data(b"x" * (ROW_BYTES - 1) + b"\n") * rows
