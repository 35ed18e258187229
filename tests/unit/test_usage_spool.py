"""The spool: numbers, ownership, bounds, and files as a crash may leave them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogelproxy._usage import Attribution, UsageTable
from ogelproxy.errors import SpoolUnusable
from ogelproxy.usage.spool import SLOT_BYTES, Spool, read_batch

FILE_BYTES = 64 * SLOT_BYTES
MAX_BYTES = 64 * FILE_BYTES


def opened(directory: Path, max_bytes: int = MAX_BYTES) -> Spool:
    spool = Spool(directory, max_bytes, FILE_BYTES)
    spool.open()
    return spool


def numbers(paths: list[Path]) -> list[int]:
    return [read_batch(path).number for path in paths]


def test_numbers_grow_over_restarts_though_all_files_were_removed(
    tmp_path: Path,
) -> None:
    seen = []
    nodes = set()
    for _ in range(3):
        spool = opened(tmp_path)
        nodes.add(spool.node)
        for _ in range(2):
            path = spool.open_batch()
            seen.append(read_batch(path).number)
            spool.seal(path, 2 * SLOT_BYTES)
            spool.remove(path)
        spool.close()
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(nodes) == 1


def test_numbers_go_on_behind_the_files_if_the_record_is_older(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    before = (tmp_path / "node").read_bytes()
    spool.open_batch()
    node = (tmp_path / "node").read_bytes()
    assert len(node) == 48 and before == b""
    spool.close()
    (tmp_path / "node").write_bytes(node.replace(b"0000000001", b"0000000000"))
    heir = opened(tmp_path)
    assert read_batch(heir.open_batch()).number == 2
    heir.close()


def test_a_batch_is_closed_only_when_it_is_sealed(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    first, second = spool.open_batch(), spool.open_batch()
    assert spool.closed() == []
    spool.seal(first, 2 * SLOT_BYTES)
    assert spool.closed() == [first]
    assert first.stat().st_size == 2 * SLOT_BYTES
    spool.seal(second, SLOT_BYTES)
    assert spool.closed() == [first], "an empty batch is nothing to deliver"
    spool.close()


def test_batches_of_a_killed_process_are_closed_to_the_next(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    left = [spool.open_batch(), spool.open_batch()]
    (tmp_path / "0000000009.new").write_bytes(b"half made")
    spool.close()
    heir = opened(tmp_path)
    assert heir.closed() == left
    assert not (tmp_path / "0000000009.new").exists()
    heir.close()


def test_a_second_process_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from ogelproxy.usage.spool import Spool\n"
        "Spool(Path(sys.argv[1]), 1 << 20, 8192).open()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    spool = opened(tmp_path)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"{tmp_path} is in use by another process" in refused.stderr
    spool.close()
    assert subprocess.run(command).returncode == 0


def test_a_full_spool_refuses_a_batch_and_takes_one_after_a_removal(
    tmp_path: Path,
) -> None:
    spool = opened(tmp_path, max_bytes=3 * FILE_BYTES + 512)
    paths = [spool.open_batch() for _ in range(3)]
    assert spool.is_nearly_full()
    with pytest.raises(SpoolUnusable, match="max_spool_bytes"):
        spool.open_batch()
    spool.seal(paths[0], FILE_BYTES)
    spool.remove(paths[0])
    assert not spool.is_nearly_full()
    assert spool.open_batch() not in paths
    spool.close()


def test_a_spool_too_small_for_two_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpoolUnusable, match=r"usage\.max_rows"):
        opened(tmp_path, max_bytes=FILE_BYTES)
    opened(tmp_path).close()


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    # A limit on file size fails where a full disk does: at the reservation.
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from ogelproxy.usage.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 1 << 20, 8192); spool.open()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: spool.open_batch()\n"
        "except OSError: print(spool.closed(), spool.used_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[] 48\n"
    assert os.listdir(tmp_path) == ["node"]
    spool = opened(tmp_path)
    assert read_batch(spool.open_batch()).number == 2
    spool.close()


@pytest.mark.parametrize("content", [b"hello", b"x" * 48, b"\0" * 48])
def test_a_directory_of_something_else_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "node").write_bytes(content)
    with pytest.raises(SpoolUnusable, match="not a spool's"):
        opened(tmp_path)
    assert (tmp_path / "node").read_bytes() == content


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolUnusable):
        opened(tmp_path / "file")


def test_an_unreadable_file_is_set_aside_and_not_offered_again(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    foreign = tmp_path / "0000000007.batch"
    foreign.write_bytes(b"no batch at all" * 100)
    assert spool.closed() == [foreign]
    with pytest.raises(SpoolUnusable):
        read_batch(foreign)
    spool.set_aside(foreign)
    spool.set_aside(foreign)
    assert spool.closed() == []
    assert (tmp_path / "0000000007.unreadable").exists()
    spool.close()


def test_files_that_are_not_batches_are_left_alone(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    (tmp_path / "notes.batch").touch()
    assert spool.closed() == []
    spool.close()


def full_batch(directory: Path) -> bytes:
    """Return a batch of two payers with four rows each."""
    table = UsageTable(16)
    spool = Spool(directory, MAX_BYTES, table.file_bytes)
    spool.open()
    path = spool.open_batch()
    table.rotate(path)
    for number in range(2):
        who = Attribution(
            table,
            bytes([number]) * 16,
            handle=f"org_{number}",
            database="app",
            database_type="neon",
            tier="pro",
            application_name="x" * 64,
            work_mem_bytes=1.0,
        )
        for fingerprint in range(4):
            table.record(who, fingerprint=fingerprint, rows=7)
    spool.seal(path, table.close())
    spool.close()
    return path.read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_file_cut_or_holed_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        whole = bytearray(full_batch(Path(directory)))
        path = Path(directory) / "damaged"
        # A crash of the machine can lose any part that was not yet on disk.
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, len(whole)))
        whole[start:end] = bytes(end - start)
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        try:
            batch = read_batch(path)
        except SpoolUnusable:
            return
        assert len(batch.rows) + batch.unreadable <= 8
        for row in batch.rows:
            assert row.queries in (0, 1) and row.rows in (0, 7)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_are_read_or_refused(content: bytes, has_header: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "any"
        header = full_batch(Path(directory))[:SLOT_BYTES] if has_header else b""
        path.write_bytes(header + content)
        try:
            read_batch(path)
        except SpoolUnusable:
            assert not has_header


def test_two_rows_of_a_payer_that_was_lost_are_counted_as_unreadable(
    tmp_path: Path,
) -> None:
    whole = bytearray(full_batch(tmp_path))
    whole[SLOT_BYTES : 3 * SLOT_BYTES] = bytes(2 * SLOT_BYTES)
    path = tmp_path / "holed"
    path.write_bytes(whole)
    batch = read_batch(path)
    assert (len(batch.rows), batch.unreadable) == (4, 4)
