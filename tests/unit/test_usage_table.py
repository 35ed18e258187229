"""The compiled table against its slow twin, at its bounds, and through kill -9."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.errors import ServerBusy, SpoolUnusable
from ogelproxy.usage.spool import HEADER, SLOT_BYTES, Batch, Spool, read_batch
from tests.reference import UsageTwin

WORK_MEM = 4 << 20
MAX_ROWS = 64


def payer(table: UsageTable, number: int, **texts: str) -> Attribution:
    """Return who pays, told apart by `number`."""
    fields = {
        "handle": f"org_{number}",
        "database": "app",
        "database_type": "postgres",
        "tier": "free",
        "application_name": "psql",
    }
    return Attribution(
        table, UUID(int=number).bytes, work_mem_bytes=WORK_MEM, **(fields | texts)
    )


class Desk:
    """A table on a spool of its own, and what it has counted so far."""

    def __init__(self, directory: Path, max_rows: int = MAX_ROWS) -> None:
        self.table = UsageTable(max_rows)
        self.spool = Spool(directory, 1 << 26, self.table.file_bytes)
        self.spool.open()
        self.path = self.spool.open_batch()
        self.table.rotate(self.path)

    def rotate(self) -> Batch:
        """Go on to the next batch and read the one left."""
        left, self.path = self.path, self.spool.open_batch()
        used_bytes = self.table.rotate(self.path)
        batch = read_batch(left)
        self.spool.seal(left, used_bytes)
        if used_bytes > SLOT_BYTES:
            assert read_batch(left) == batch
        self.spool.remove(left)
        return batch

    def close(self) -> None:
        self.table.close()
        self.spool.close()


def totals(batches: list[Batch]) -> dict[str, float]:
    """Sum what no folding of rows may change."""
    names = (
        "queries refused errors rows bytes_in bytes_out server_seconds "
        "vcpu_seconds memory_gib_seconds"
    ).split()
    rows = [row for batch in batches for row in batch.rows]
    return {name: sum(getattr(row, name) for row in rows) for name in names}


seconds = st.floats(0, 1000, allow_subnormal=False)
counts = st.integers(0, 1 << 40)
measures = st.fixed_dictionaries(
    {
        "fingerprint": st.sampled_from([0, 1, 2, 1 << 32, (1 << 64) - 1]),
        "complexity": st.integers(100, 2000),
        "queries": st.integers(0, 3),
        "refused": st.integers(0, 3),
        "sqlstate": st.sampled_from([None, b"42601", b"40001"]),
        "rows": st.sampled_from([0, 1, 1000, 1001, 1 << 33]),
        "bytes_in": counts,
        "bytes_out": counts,
        "server_seconds": seconds,
        "queue_seconds": seconds,
        "throttled_seconds": seconds,
    }
)
steps = st.lists(
    st.one_of(st.tuples(st.integers(0, 4), measures), st.just("rotate")), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_table_and_its_twin_agree_on_every_row_of_every_batch(
    steps: list[Any],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        desk = Desk(Path(directory))
        payers = [payer(desk.table, number) for number in range(5)]
        twin = UsageTwin(work_mem_bytes=WORK_MEM)
        for step in [*steps, "rotate"]:
            if step != "rotate":
                number, measure = step
                desk.table.record(payers[number], **measure)
                twin.record(number, **measure)
                continue
            found = {
                (row.payer.org_id.int, row.fingerprint): row
                for row in desk.rotate().rows
            }
            expected = twin.rotate()
            assert found.keys() == expected.keys()
            for key, fields in expected.items():
                row = found[key]
                for name, value in fields.items():
                    if isinstance(value, float):
                        value = pytest.approx(value, rel=1e-6)
                    assert getattr(row, name) == value, name
        desk.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, (1 << 64) - 1), min_size=1, max_size=300))
def test_a_full_table_folds_rows_and_loses_nothing(prints: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        desk = Desk(Path(directory), max_rows=16)
        who = [payer(desk.table, number) for number in range(3)]
        for at, fingerprint in enumerate(prints):
            desk.table.record(who[at % 3], fingerprint=fingerprint, rows=1)
        assert desk.table.is_full or len(set(prints)) < 16
        sums = totals([desk.rotate()])
        assert (sums["queries"], sums["rows"]) == (len(prints), len(prints))
        assert not desk.table.is_full
        desk.close()


def test_living_attributions_always_find_room_and_one_too_many_is_refused(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, max_rows=16)
    who: list[Attribution] = []
    with pytest.raises(ServerBusy):
        while True:
            who.append(payer(desk.table, len(who)))
    assert len(who) >= 16
    for fingerprint in range(1, 4):
        for attribution in who:
            desk.table.record(attribution, fingerprint=fingerprint)
    assert totals([desk.rotate()])["queries"] == 3 * len(who)
    # All of them again: rotation keeps room for who is still there.
    for attribution in who:
        desk.table.record(attribution)
    assert totals([desk.rotate()])["queries"] == len(who)
    desk.close()


def test_room_comes_back_when_attributions_are_gone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, max_rows=16)
    for _ in range(20):
        for number in range(16):
            desk.table.record(payer(desk.table, number))
        assert totals([desk.rotate()])["queries"] == 16
    desk.close()


def test_attributions_that_never_counted_give_their_room_back_at_once(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, max_rows=16)
    for number in range(1000):
        payer(desk.table, number)
    desk.close()


def test_long_texts_are_cut_between_characters(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    name = "x" * 63 + "é"
    who = payer(desk.table, 1, application_name=name, database="ü" * 50, tier="\ud800")
    desk.table.record(who)
    (row,) = desk.rotate().rows
    assert row.payer.application_name == "x" * 63
    assert row.payer.database == "ü" * 32
    assert row.payer.tier == "?"
    desk.close()


def test_a_text_ends_at_its_first_zero_byte(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.table.record(payer(desk.table, 1, application_name="a\0b"))
    assert desk.rotate().rows[0].payer.application_name == "a"
    desk.close()


def test_counting_without_a_batch_does_nothing(tmp_path: Path) -> None:
    table = UsageTable(16)
    who = payer(table, 1)
    table.record(who, fingerprint=1)
    spool = Spool(tmp_path, 1 << 26, table.file_bytes)
    spool.open()
    table.rotate(spool.open_batch())
    table.record(who, fingerprint=1)
    assert table.close() == 5 * SLOT_BYTES
    table.record(who, fingerprint=1)
    assert (table.batch, table.is_empty) == (0, True)
    assert totals([read_batch(tmp_path / "0000000001.batch")])["queries"] == 1
    spool.close()


def test_a_file_of_another_shape_is_refused_and_counting_goes_on(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)
    who = payer(desk.table, 1)
    desk.table.record(who)
    foreign = tmp_path / "foreign"
    for content in (
        b"",
        b"x" * SLOT_BYTES,
        b"\0" * desk.table.file_bytes,
        HEADER.pack(b"O7SUSAGE", 1, 7, 9, 0.0, b"n" * 16).ljust(
            desk.table.file_bytes, b"\0"
        ),
        # The very batch that is open: a number never comes twice.
        desk.path.read_bytes(),
    ):
        foreign.write_bytes(content)
        with pytest.raises(SpoolUnusable):
            desk.table.rotate(foreign)
    with pytest.raises(FileNotFoundError):
        desk.table.rotate(tmp_path / "absent")
    desk.table.record(who)
    assert totals([desk.rotate()])["queries"] == 2
    desk.close()


def test_an_attribution_of_another_table_is_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(ValueError, match="another table"):
        desk.table.record(payer(UsageTable(16), 1))
    desk.close()


COUNTER = """
import os, struct, sys
from pathlib import Path
from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.usage.spool import Spool

table = UsageTable(64)
spool = Spool(Path(sys.argv[1]), 1 << 26, table.file_bytes)
spool.open()
table.rotate(spool.open_batch())
who = [
    Attribution(table, bytes([n]) * 16, handle="org_k", database="app",
                database_type="postgres", tier="free", application_name=str(n),
                work_mem_bytes=0)
    for n in range(5)
]
done = 0
while True:
    for _ in range(97):
        table.record(who[done % 5], fingerprint=1 + done % 37, rows=1)
        done += 1
    os.write(1, struct.pack("<Q", done))
"""


@pytest.mark.parametrize("reports", [1, 10, 100, 1000, 5000])
def test_every_query_reported_before_a_kill_is_there_once(
    tmp_path: Path, reports: int
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", COUNTER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    for _ in range(reports):
        assert len(child.stdout.read(8)) == 8
    child.kill()
    rest = child.stdout.read()
    child.stdout.close()
    child.wait()
    # What had been reported when the kill came, and what may have followed it.
    reported = (
        struct.unpack_from("<Q", rest, (len(rest) // 8 - 1) * 8)[0]
        if (len(rest) >= 8)
        else 97 * reports
    )
    heir = Spool(tmp_path, 1 << 26, UsageTable(64).file_bytes)
    heir.open()
    sums = totals([read_batch(path) for path in heir.closed()])
    assert reported <= sums["queries"] <= reported + 97
    assert sums["queries"] - 1 <= sums["rows"] <= sums["queries"]
    heir.close()
