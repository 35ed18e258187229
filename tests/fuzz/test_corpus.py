"""What fuzzers found is tried again, by plain pytest and without sanitizers."""

from __future__ import annotations

import pytest

from ogelproxy._fingerprint import ScanResult, scan
from tests import reference
from tests.fuzz import targets


@pytest.mark.parametrize("name", targets.MODULES)
def test_no_input_of_the_corpus_makes_its_target_fail(name: str) -> None:
    target = targets.load(name)
    inputs = target.inputs
    assert len(inputs) > 5 <= len(target.seeds)
    for data in inputs:
        target.run(data)


@pytest.mark.parametrize("name", targets.MODULES)
def test_a_corpus_reads_as_it_was_written(
    name: str, tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [*targets.read_corpus(name), bytes(range(256)), b"\\x00\\"]
    monkeypatch.setattr(targets, "CORPUS", tmp_path)
    targets.write_corpus(name, inputs)
    assert sorted(targets.read_corpus(name)) == sorted(inputs)


def test_a_lexer_that_is_wrong_somewhere_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgets_copy(sql: bytes) -> ScanResult:
        found = scan(sql)
        return found._replace(statements=1) if b"copy" in sql else found

    monkeypatch.setattr(reference, "scan", forgets_copy)
    target = targets.load("sql")
    with pytest.raises(AssertionError):
        for data in target.inputs:
            target.run(data)
