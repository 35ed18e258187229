"""What psql would send of a script, and what the rewritings make of statements."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import corpus, rewritings
from bench.fingerprint import FingerprintCase
from ogelproxy._fingerprint import scan

CUTS = [
    ("select 1; select 2", ["select 1", "select 2"]),
    (
        "select ';' as \"a;\"; select e'\\';'",
        ["select ';' as \"a;\"", "select e'\\';'"],
    ),
    ("do $x$ ; $y$ ; $$ ; $x$; select 1", ["do $x$ ; $y$ ; $$ ; $x$", "select 1"]),
    ("select 1 -- ;\n; -- end", ["select 1 -- ;", "-- end"]),
    ("select /* ; /* ; */ ; */ 1; a", ["select /* ; /* ; */ ; */ 1", "a"]),
    ("create rule r as do (a; b); c", ["create rule r as do (a; b)", "c"]),
    (
        "create function f() begin atomic select 1; end; select 2",
        ["create function f() begin atomic select 1; end", "select 2"],
    ),
    ("\\set x ';\nselect 1 \\gset\nselect 2", ["select 1", "select 2"]),
    ("select 1\\; select 2;", ["select 1", "select 2"]),
    (
        "copy t from stdin;\n1\tit's\n2\t;\n\\.\nselect 1;",
        ["copy t from stdin", "select 1"],
    ),
    ("copy no from stdin;\n\nselect 1;\n\\.", ["copy no from stdin", "select 1"]),
    ("copy t to stdout;\nselect 1;\n\\.\n", ["copy t to stdout", "select 1"]),
]


@pytest.mark.parametrize(("script", "statements"), CUTS)
def test_a_script_is_cut_where_psql_would(script: str, statements: list[str]) -> None:
    assert list(corpus.cut(script)) == statements


def test_statements_of_many_files_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.sql").write_text("select 1; select 2; select 1")
    (tmp_path / "below" / "b.sql").write_text("select 2;\n\nselect 3")
    (tmp_path / "c.txt").write_text("select 4")
    files = corpus.files_of(tmp_path)
    assert corpus.statements(files) == ["select 1", "select 2", "select 3"]


def test_our_own_statements_are_each_cut_as_one() -> None:
    statements = corpus.statements(corpus.files_of(corpus.OWN))
    assert len(statements) > 50
    assert {scan(each.encode()).statements for each in statements} == {1}


def test_words_have_no_case_comments_literals_or_signs() -> None:
    assert rewritings.words("SELECT -- x\n \"A\", 'b', -1, a -1 /* y */, $1, NULL") == (
        " select a , ? , ? , a - ? , ? , ? "
    )
    assert rewritings.without_comments("/* x */ a /* y */ b -- z") == "a   b"


JOINED = [
    ("noise words and synonyms", "BEGIN WORK", "start transaction"),
    ("what SET sets to", "set a.b = 1", "SET a.b TO x, y"),
    (
        "names of cursors, savepoints and prepared statements",
        "fetch 2 from a",
        'FETCH 3 IN "b"',
    ),
    ("names of roles", "drop user a", "DROP USER b"),
    (
        "casts and types of constants",
        "select '1'::numeric(3, 2)[]",
        "select interval '1' day",
    ),
    ("labels of columns and tables", "select a as b from c", "select a from c as d"),
    (
        "how many and in which order: arguments, columns, tables, rows",
        "select f(1)",
        "select f(1, 2)",
    ),
    ("parentheses, and the order of all words", "select (a), b", "select b, a"),
]


@pytest.mark.parametrize(("name", "one", "other"), JOINED)
def test_a_rewriting_joins_what_it_is_named_for(
    name: str, one: str, other: str
) -> None:
    known = rewritings.finer_than_libpg_query()
    joins = [each for each, rewrite in known if rewrite(one) == rewrite(other)]
    assert joins[0] == name


def test_signs_and_values_of_options_join_for_reasons_of_their_own() -> None:
    (_, unsigned), (_, plain) = rewritings.coarser_than_libpg_query()
    assert unsigned("select '1'::int / -1::int") == unsigned("select '1'::int / 1::int")
    assert unsigned("select a - 1") != unsigned("select a")
    assert plain("comment on table t is 'a'") == plain("comment on table t is 'b'")
    assert plain("comment on table t is 'a'") != plain("comment on table u is 'a'")


def test_a_folder_is_grouped_and_each_pair_that_differs_has_a_reason(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.sql").write_text(
        "select a from t where b = 1; select a from t where b = -2; begin; begin work;"
        "drop type a; create collation c (locale = 'x');"
        "create collation c (locale = 'y'); select from :nowhere; -- nothing"
    )
    case = FingerprintCase()
    result = case.run(f"grouping of {tmp_path}", is_quick=True)
    assert not result.failures
    assert result.figures == {
        "statements": 7,
        "groups": 5,
        "groups of libpg_query": 5,
        "pairs in both": 1,
        "pairs only here": 1,
        "pairs only in libpg_query": 1,
        "refused by libpg_query": 1,
    }
    assert [(row["only_in"], row["name"]) for row in result.rows if row["pairs"]] == [
        ("ogelproxy", "values that no expression holds: options, labels, comments"),
        ("libpg_query", "noise words and synonyms"),
    ]
    assert len(case.tables([result])) == 2


def test_a_folder_without_statements_is_a_failure(tmp_path: Path) -> None:
    result = FingerprintCase().run(f"grouping of {tmp_path}", is_quick=True)
    assert result.failures == [f"grouping of {tmp_path}: there are no statements"]
