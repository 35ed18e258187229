"""List the fixture files and print what the run depends on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from ogelproxy.embedded import find_binaries
from ogelproxy.embedded_valkey import find_valkey
from ogelproxy.errors import EmbeddedFailed

# In this order: a plugin's tests of values are shown well only when nothing
# imported it before.
pytest_plugins = [
    "tests.fixtures.postgres",
    "tests.fixtures.redis",
    "tests.fixtures.certificates",
    "tests.fixtures.findings",
    "tests.fixtures.engine",
    "tests.fixtures.fleet",
    "tests.fixtures.mongodb",
    "tests.fixtures.secured",
    "tests.fixtures.servers",
    "tests.fixtures.workers",
]


def pytest_report_header() -> list[str]:
    """Name the interpreter, the loop, Cython and the servers of this run."""
    named = "named by OGELPROXY_TEST_POSTGRES"
    try:
        postgres = str(find_binaries(os.environ))
    except EmbeddedFailed as error:
        postgres = str(error)
    try:
        valkey = str(find_valkey(os.environ))
    except EmbeddedFailed as error:
        valkey = str(error)
    return [
        f"python: {platform.python_version()}, uvloop {version('uvloop')}, "
        f"cython {version('cython')}",
        f"postgres: {named if os.environ.get('OGELPROXY_TEST_POSTGRES') else postgres}",
        f"valkey: {valkey}",
    ]
