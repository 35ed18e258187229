"""Spools that workers share: who writes where, and who delivers what was left."""

from __future__ import annotations

from pathlib import Path

import pytest

from ogelproxy.errors import SpoolUnusable
from ogelproxy.usage.spool import SLOT_BYTES, Spool, read_batch
from ogelproxy.usage.spools import Spools

FILE_BYTES = 64 * SLOT_BYTES
MAX_BYTES = 64 * FILE_BYTES


def spools(directory: Path, *, is_shared: bool = True) -> Spools:
    made = Spools(directory, MAX_BYTES, FILE_BYTES, is_shared=is_shared)
    made.open()
    return made


def names(paths: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in paths]


def test_each_worker_writes_the_first_directory_that_is_free(tmp_path: Path) -> None:
    first, second = spools(tmp_path), spools(tmp_path)
    assert first.open_batch().parent.name == "worker-1"
    assert second.open_batch().parent.name == "worker-2"
    first.close()
    third = spools(tmp_path)
    assert third.open_batch().parent.name == "worker-1"
    second.close()
    third.close()


def test_who_is_alone_writes_the_directory_itself(tmp_path: Path) -> None:
    alone = spools(tmp_path, is_shared=False)
    assert alone.open_batch().parent == tmp_path
    with pytest.raises(SpoolUnusable, match="in use by another process"):
        spools(tmp_path, is_shared=False)
    alone.close()


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("was_shared", [True, False])
def test_what_was_left_is_adopted_in_every_layout(
    tmp_path: Path, was_shared: bool, is_shared: bool
) -> None:
    gone = [spools(tmp_path), spools(tmp_path)] if was_shared else []
    gone = gone or [spools(tmp_path, is_shared=False)]
    left = {read_batch(each.open_batch()).id for each in gone}
    for each in gone:
        each.close()
    heir = spools(tmp_path, is_shared=is_shared)
    heir.adopt()
    assert {read_batch(path).id for path in heir.closed()} == left
    heir.close()


def test_what_somebody_writes_is_not_adopted(tmp_path: Path) -> None:
    busy, other = spools(tmp_path), spools(tmp_path)
    batch = busy.open_batch()
    assert not other.adopt()
    busy.seal(batch, 2 * SLOT_BYTES)
    assert not other.adopt()
    assert names(busy.closed()) == ["worker-1/0000000001.batch"]
    assert other.closed() == []
    busy.close()
    other.close()


def test_what_is_adopted_is_ours_alone_until_it_is_delivered(tmp_path: Path) -> None:
    gone, first, second = (spools(tmp_path) for _ in range(3))
    gone.open_batch()
    gone.close()
    assert first.adopt()
    assert not second.adopt()
    # A worker that comes meanwhile writes elsewhere.
    late = spools(tmp_path)
    assert late.open_batch().parent.name == "worker-4"
    (path,) = first.closed()
    first.remove(path)
    assert not first.adopt()
    heir = spools(tmp_path)
    number = read_batch(heir.open_batch()).number
    assert (number, heir.closed()) == (2, []), "numbers go on where they were"
    for each in (first, second, late, heir):
        each.close()


def test_a_directory_that_is_no_spool_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = tmp_path / "worker-9"
    strange.mkdir()
    (strange / "node").write_text("something else")
    (strange / "0000000001.batch").write_bytes(b"")
    here = spools(tmp_path)
    assert not here.adopt()
    assert "left where it lies" in caplog.text
    assert (strange / "0000000001.batch").exists()
    here.close()


def test_an_adopted_batch_keeps_the_node_that_wrote_it(tmp_path: Path) -> None:
    gone = Spool(tmp_path / "worker-1", MAX_BYTES, FILE_BYTES)
    gone.open()
    gone.open_batch()
    node = gone.node
    gone.close()
    alone = spools(tmp_path, is_shared=False)
    alone.adopt()
    assert [read_batch(path).node for path in alone.closed()] == [node]
    alone.close()
