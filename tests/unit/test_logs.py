"""Log lines: one per event, in two forms, with no secret in them."""

from __future__ import annotations

import logging
import sys

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogelproxy.logs import MAX_TEXT_CHARACTERS, JsonFormatter, TextFormatter, mask

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJvcmdfaWQiOiJvcmdfYSJ9.c2lnbmF0dXJl"
ALPHABET = st.characters(categories=("L", "N"), max_codepoint=127)


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "ogelproxy.login", "levelname": "INFO", "msg": message, "created": 0.0}
        | extra
    )


def test_text_puts_the_fields_behind_the_event() -> None:
    line = TextFormatter().format(record("accepted", tenant="org_a", client="[::1]:9"))
    assert line == (
        "1970-01-01T00:00:00.000+00:00 info ogelproxy.login accepted "
        "tenant=org_a client=[::1]:9"
    )


def test_json_keeps_numbers_and_names() -> None:
    line = JsonFormatter().format(record("accepted", tenant="org_a", count=3))
    assert orjson.loads(line) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "ogelproxy.login",
        "event": "accepted",
        "tenant": "org_a",
        "count": 3,
    }


@given(st.text(), st.text())
def test_whatever_a_client_sends_stays_on_one_line(event: str, field: str) -> None:
    sent = record("%s", args=(event,), tenant=field)
    line = TextFormatter().format(sent)
    # Python's own idea of a line end is the widest there is.
    assert len(line.splitlines()) == 1
    line.encode()
    assert b"\n" not in JsonFormatter().format(sent).encode()


def test_a_traceback_is_one_line_without_its_secrets() -> None:
    try:
        raise ValueError("password=hunter2\nsecond line")
    except ValueError:
        failed = record("failed", exc_info=sys.exc_info())
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(failed)
        assert "ValueError" in line
        assert "hunter2" not in line
        assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "key hunter2 is ogk_hunter2",
        "postgresql://org_a:hunter2@db.example.com:5432/app",
        "postgresql://org_a:p@ss/hunter2@db.example.com/app",
        "redis://:hunter2@cache:6379/0",
        "host=db password=hunter2 user=a",
        "host=db password = 'it''s hunter2' user=a",
        r"password='it\'s hunter2' user=a",
        "?user=a&password=hunter2&x=y",
        "{'password': 'hunter2'}",
        '{"password": "a \\" hunter2"}',
        "CREATE ROLE a LOGIN PASSWORD 'hunter2'",
        "OGELPROXY_PASSWORD=hunter2",
    ],
)
def test_a_password_in_any_clothes_is_starred_out(text: str) -> None:
    assert "hunter2" not in mask(text.removeprefix("key hunter2 is "))


@given(st.text(ALPHABET, min_size=8, max_size=40), st.text(max_size=20))
def test_a_url_password_never_survives(password: str, around: str) -> None:
    url = f"postgresql://someone:{password}{password}@host/name"
    assert password * 2 not in mask(f"{around} {url}")


def test_keys_and_tokens_are_starred_out_of_messages_and_fields() -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record(f"got {TOKEN}", key="ogk_abcDEF0123456789"))
        assert TOKEN[-12:] not in line
        assert "abcDEF" not in line
        assert "ogk_***" in line


def test_text_without_secrets_is_left_as_it_is() -> None:
    text = "tier=free limit=10/s http://127.0.0.1:8080/health password rejected"
    assert mask(text) == text


def test_a_text_is_cut_to_a_bounded_length() -> None:
    assert len(mask("x" * (MAX_TEXT_CHARACTERS * 2))) == MAX_TEXT_CHARACTERS + 1
