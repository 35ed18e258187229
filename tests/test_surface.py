"""The public face: names, errors, and what the documentation says of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import ogelproxy
from ogelproxy import OgelError, errors
from ogelproxy.errors import (
    CircuitOpen,
    DatabaseDisabled,
    DatabaseUnknown,
    FeatureNotIncluded,
    InternalError,
    NotSupported,
    OperationRefused,
    PoolTimeout,
    ProtocolViolation,
    TargetUnreachable,
    TooManyInFlight,
)
from ogelproxy.pool import SettingsRefused
from ogelproxy.protocol import messages

ROOT = Path(__file__).parent.parent
MAX_LINES = 600

KINDS = set("client auth limit tenant pool server backend control internal".split())

#: Those that are made from something other than a text for the log.
MADE: dict[type[OgelError], OgelError] = {
    CircuitOpen: CircuitOpen(1.5, TargetUnreachable()),
    DatabaseDisabled: DatabaseDisabled("app"),
    DatabaseUnknown: DatabaseUnknown("app"),
    FeatureNotIncluded: FeatureNotIncluded("replication", "free"),
    InternalError: InternalError("IndexError: 3"),
    NotSupported: NotSupported("a cursor"),
    OperationRefused: OperationRefused("no such tier"),
    PoolTimeout: PoolTimeout(1.5),
    ProtocolViolation: ProtocolViolation("bad length"),
    SettingsRefused: SettingsRefused({"C": "22023", "M": "no such zone"}),
    TooManyInFlight: TooManyInFlight(1.5),
}


def subclasses(root: type[OgelError]) -> Iterator[type[OgelError]]:
    for each in root.__subclasses__():
        yield each
        yield from subclasses(each)


ERRORS = sorted(
    (each for each in subclasses(OgelError) if each.__module__.startswith("ogelproxy")),
    key=lambda each: each.code,
)
#: What docs/errors.md says, by code: SQLSTATE, severity.
DOCUMENTED = {
    code: (sqlstate, severity)
    for code, sqlstate, severity in re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| (\w+) \|",
        (ROOT / "docs" / "errors.md").read_text(),
        re.MULTILINE,
    )
}


def test_public_names_are_sorted_and_there() -> None:
    assert ogelproxy.__all__ == sorted(ogelproxy.__all__)
    assert len(set(ogelproxy.__all__)) == len(ogelproxy.__all__)
    for name in ogelproxy.__all__:
        assert hasattr(ogelproxy, name)
    assert ogelproxy.__version__ == version("ogelproxy")


def test_every_error_of_errors_py_is_public() -> None:
    public = {getattr(ogelproxy, name) for name in ogelproxy.__all__}
    missing = {each for each in ERRORS if each.__module__ == errors.__name__} - public
    assert not missing


def test_importing_the_package_opens_nothing() -> None:
    program = (
        "import os, logging, asyncio, signal\n"
        "files = set(os.listdir('/proc/self/fd'))\n"
        "policy = type(asyncio.get_event_loop_policy())\n"
        "import ogelproxy\n"
        "assert set(os.listdir('/proc/self/fd')) == files\n"
        "assert type(asyncio.get_event_loop_policy()) is policy\n"
        "assert not logging.getLogger().handlers\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_error_codes_are_unique() -> None:
    codes = [each.code for each in ERRORS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda each: str(each.code))
def test_an_error_has_a_sqlstate_and_two_texts(kind: type[OgelError]) -> None:
    error = MADE.get(kind) or kind("told to the log only")
    assert re.fullmatch(r"[0-9A-Z]{5}", error.sqlstate)
    assert kind.kind in KINDS
    assert error.client_text
    assert "told to the log only" not in error.client_text
    assert str(error)
    assert kind.__doc__
    fields = messages.read_fields(messages.error_response(error)[5:])
    assert fields["S"] == fields["V"] == error.severity
    assert (fields["C"], fields["M"]) == (error.sqlstate, error.client_text)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda each: str(each.code))
def test_an_error_is_documented_as_it_is(kind: type[OgelError]) -> None:
    severity = "FATAL" if kind.is_fatal else "ERROR"
    sqlstate = "the database's own" if kind is SettingsRefused else kind.sqlstate
    assert DOCUMENTED[kind.code] == (sqlstate, severity)


def test_the_documentation_lists_no_error_that_is_not_there() -> None:
    assert set(DOCUMENTED) == {each.code for each in ERRORS}


def test_no_file_is_too_long() -> None:
    sources = [
        path
        for directory in ("ogelproxy", "bench")
        for path in (ROOT / directory).rglob("*")
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi")
    ]
    lengths = {path: len(path.read_text().splitlines()) for path in sources}
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}
