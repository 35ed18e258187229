"""Which settings and prepared statements SQL names."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.protocol.sql import (
    ALL,
    MAX_TEXT,
    named_statements,
    settings_changed,
    tokens,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("SET a = 1", {"a"}),
        ("set session X.y to 'v'; SELECT 1", {"x.y"}),
        ("SET LOCAL x = 1", set()),
        ("SET local.answer = 42", {"local.answer"}),
        ("SET session.x = 1", {"session.x"}),
        ("SET TIME ZONE 'UTC'", {"timezone"}),
        ("SET NAMES 'utf8'", {"client_encoding"}),
        ("SET SCHEMA 'a'", {"search_path"}),
        ("SET ROLE x; RESET role", {"role"}),
        ("SET SESSION AUTHORIZATION x", {"session_authorization", "role"}),
        ("SET TRANSACTION READ ONLY", set()),
        ("SET transaction_isolation = serializable", set()),
        ("RESET ALL", {ALL}),
        ("DISCARD ALL", {ALL}),
        ("DISCARD TEMP", set()),
        ("RESET work_mem", {"work_mem"}),
        ("SELECT 'SET a = 1'; -- SET b = 1\nSET c = 1", {"c"}),
        ('/* /* nested */ SET a = 1 */ SET "B".c = 1', {"b.c"}),
        ("SELECT $$SET a = 1$$; SET b = $x$;SET c = 1$x$", {"b"}),
        (
            "SELECT set_config('A', 'b', false), set_config('c'::text, 'd', $1)",
            {"a", "c"},
        ),
        ("SELECT set_config($1, $2, true)", set()),
        ("SELECT pg_catalog.set_config('a', f(1, (2)), false)", {"a"}),
    ],
)
def test_settings_are_named(text: str, names: set[str]) -> None:
    assert settings_changed(text.encode()) == names


@pytest.mark.parametrize(
    "text",
    [
        "SELECT set_config($1, $2, false)",
        "SELECT set_config('a' || 'b', 'c', false)",
        "SELECT set_config(E'a', 'c', false)",
        "UPDATE pg_settings SET setting = 1 WHERE name = 'work_mem'",
        "SET seed = 0.5",
        "SET a = 1" + " " * MAX_TEXT,
    ],
)
def test_what_can_not_be_known_is_not_guessed(text: str) -> None:
    assert settings_changed(text.encode()) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PREPARE Foo (int) AS SELECT $1", [("prepare", b"foo", 0)]),
        ('EXECUTE "a""B"(1)', [("execute", b'a"B', 0)]),
        ("DEALLOCATE PREPARE x", [("deallocate", b"x", 0)]),
        ("DEALLOCATE prepare", [("deallocate", b"prepare", 0)]),
        ("DEALLOCATE ALL", []),
        ("PREPARE TRANSACTION 'x'", []),
        ("PREPARE transaction AS SELECT 1", [("prepare", b"transaction", 0)]),
        ("EXPLAIN (ANALYZE) EXECUTE p(1)", [("execute", b"p", 0)]),
        ("CREATE TABLE t AS EXECUTE p", [("execute", b"p", 0)]),
        (
            ";BEGIN; PREPARE p AS SELECT ';'; EXECUTE p",
            [("prepare", b"p", 1), ("execute", b"p", 2)],
        ),
        ("SELECT 'EXECUTE p'", []),
        ("EXECUTE " + "n" * 70, [("execute", b"n" * 63, 0)]),
        ('EXECUTE U&"p"', []),
    ],
)
def test_prepared_statements_are_named(
    text: str, expected: list[tuple[str, bytes, int]]
) -> None:
    found = named_statements(text.encode())
    assert [(each.verb, each.name, each.index) for each in found] == expected


def test_a_replaced_name_says_where_it_stood_in_characters() -> None:
    text = "SELECT 'ä'; EXECUTE übung (1)".encode()
    (named,) = named_statements(text)
    assert text[named.start : named.end] == "übung".encode()
    assert named.replaced(text, b"o7s_12") == (21, 1, b"o7s_12", "übung".encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end(text: bytes) -> None:
    found = list(tokens(text))
    assert all(0 <= token.start < token.end <= len(text) for token in found)
    assert all(before.end <= after.start for before, after in pairwise(found))
    settings_changed(text)
    named_statements(text)


@given(
    st.lists(st.sampled_from(["'", '"', "$$", "/*", "*/", "--", "\n", "SET a", ";"]))
)
def test_hostile_quotes_end_somewhere(parts: list[str]) -> None:
    settings_changed(" ".join(parts).encode())
