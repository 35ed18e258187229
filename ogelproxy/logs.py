"""One event per line, as text or JSON, with no secret in it.

Owns the two formatters and the mask; the command line installs one of them.
Fields come from ``extra={"tenant": …, "client": …}``. Whatever looks like an
API key, a token or a password is starred out in messages, fields and
tracebacks, whoever logged it.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Any

import orjson

from ogelproxy.config import Log

#: A longer text is cut: a line stays readable, and masking it cheap.
MAX_TEXT_CHARACTERS = 8192
STARS = "***"

SECRETS = (
    # An API key of ours, and a JSON Web Token (RFC 7519: its header opens `{"`).
    (re.compile(r"ogk_[A-Za-z0-9_-]+"), f"ogk_{STARS}"),
    (re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"), STARS),
    # The password of a URL; its `@` may stand in it unescaped.
    (re.compile(r"(://[^\s:/@]*:)[^\s]*@"), rf"\1{STARS}@"),
    # password=…, "password": "…", PASSWORD '…'.
    (
        re.compile(
            r"""(?ix) (password["']? (?: \s*[=:]\s* | \s+(?=') ))
            (?: '(?:[^'\\]|\\.|'')*'? | "(?:[^"\\]|\\.)*"? | [^\s&,;}]+ )"""
        ),
        rf"\1{STARS}",
    ),
)

#: What a record has by itself; all else came in through `extra`.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def mask(text: str) -> str:
    """Return `text` with its secrets starred out, cut to a bounded length."""
    if len(text) > MAX_TEXT_CHARACTERS:
        text = f"{text[:MAX_TEXT_CHARACTERS]}…"
    for pattern, stars in SECRETS:
        text = pattern.sub(stars, text)
    return text


class Formatter(logging.Formatter):
    """What both forms of a line share: the fields of an event, masked."""

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the event's own fields, then those of `extra`, in order."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": mask(record.getMessage()),
        }
        for name, value in vars(record).items():
            if name not in STANDARD and name not in fields:
                is_plain = value is None or isinstance(value, bool | int | float)
                fields[name] = value if is_plain else mask(str(value))
        if record.exc_info:
            fields["exception"] = mask(self.formatException(record.exc_info))
        if record.stack_info:
            fields["stack"] = mask(record.stack_info)
        return fields


class JsonFormatter(Formatter):
    """``{"time": …, "level": …, "logger": …, "event": …, …}``."""

    def format(self, record: logging.LogRecord) -> str:
        # A lone surrogate is a str that UTF-8 can't hold.
        fields = {
            name: value.encode(errors="replace").decode()
            if isinstance(value, str)
            else value
            for name, value in self.fields(record).items()
        }
        return orjson.dumps(fields).decode()


class TextFormatter(Formatter):
    """``TIME LEVEL LOGGER EVENT name=value …``, on one line whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        head = [_one_line(fields.pop(n)) for n in ("time", "level", "logger", "event")]
        tail = [f"{name}={_quoted(value)}" for name, value in fields.items()]
        return " ".join(head + tail)


def _one_line(text: str) -> str:
    # A client may choose part of a text: it must not forge a second line, nor
    # send the terminal a control sequence.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(value: Any) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_one_line(escaped)}"'


def configure(config: Log, *, worker: int | None = None) -> None:
    """Send the process's events to standard error in the form that is set.

    Those of a worker bear its place.
    """
    handler = logging.StreamHandler()
    if worker is not None:

        def sign(record: logging.LogRecord) -> bool:
            record.worker = worker
            return True

        handler.addFilter(sign)
    handler.setFormatter(
        JsonFormatter() if config.format == "json" else TextFormatter()
    )
    root = logging.getLogger()
    root.handlers = [handler]
    logging.getLogger("ogelproxy").setLevel(config.level.upper())
