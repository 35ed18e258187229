"""Who may import whom: a module imports from rows above its own only.

Imports for types only don't count: `relay` names the client that names `relay`,
and only one of the two is imported by the other when the program runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ogelproxy"

#: Rows of modules, or of packages for all of their modules. A row sees the rows
#: above it; modules of one row don't see each other, those of one package do.
ROWS = (
    ("errors",),
    ("config", "metrics", "keys"),
    (
        "_accept",
        "_kernel",
        "_wire",
        "_bucket",
        "_fingerprint",
        "_replies",
        "_traffic",
        "_usage",
        "logs",
        "circuit",
        "allotment",
        "orders",
        "line",
        "child",
    ),
    (
        "_reactor",
        "_statements",
        "protocol",
        "settings",
        "embedded",
        "embedded_mongodb",
        "embedded_valkey",
        "redis",
        "place",
    ),
    ("_connection",),
    ("_pool", "_flights", "tenants.model", "hosts", "slots", "steps"),
    (
        "_loan",
        "tenants",
        "auth",
        "gate",
        "front",
        "limiter",
        "flights",
        "usage",
        "traffic",
    ),
    ("_server", "_client", "demo"),
    ("_simple", "server"),
    ("_naming",),
    ("_extended",),
    ("_views",),
    ("_listen", "sessions"),
    ("pool", "client", "cancel"),
    ("router", "relay", "replication"),
    ("console",),
    ("listen",),
    ("login",),
    ("listener", "admin"),
    ("engine", "supervisor", "doctor"),
    ("dev", "operate", "worker"),
    ("cli",),
    ("__init__", "__main__"),
)

#: Files that are compiled into another module.
PARTS = {"_octets": "_fingerprint", "_statement": "_fingerprint"}

#: Drivers and their places; whatever else a module needs is its own business.
DRIVERS = {
    "asyncpg": {"tenants.store"},
    "redis": {"redis", "backends.redis"},
    "motor": {"usage.mongodb", "backends.mongodb"},
    "pymongo": {"usage.mongodb", "backends.mongodb"},
    "prometheus_client": {"metrics"},
    "jwt": {"auth.jwt"},
    "uvloop": {"cli"},
    "click": {"cli", "operate"},
}

IMPORT = re.compile(r"^\s*(?:from|import|cimport) (\S+)", re.MULTILINE)


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return PARTS.get(name, name)


SOURCES: dict[str, list[Path]] = {}
for suffix in ("py", "pyx", "pxd"):
    for source in sorted(PACKAGE.rglob(f"*.{suffix}")):
        SOURCES.setdefault(module_of(source), []).append(source)


def row(module: str) -> int:
    """Find a module's row: its own, or that of the package it is in."""
    parts = module.removesuffix(".__init__").split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(ROWS):
            if ".".join(parts[:length]) in names:
                return number
    raise AssertionError(f"{module} has no row: give it one")


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from runtime_imports(node)


def imports(module: str) -> set[str]:
    """The dotted names that a module imports, as they are written."""
    names = set()
    for path in SOURCES[module]:
        if path.suffix == ".py":
            names |= set(runtime_imports(ast.parse(path.read_text())))
        else:
            names |= set(IMPORT.findall(path.read_text()))
    return names


def ours(name: str) -> str | None:
    """The module of ours that a dotted name is or lies in, or None."""
    if not name.startswith("ogelproxy."):
        return None
    parts = [PARTS.get(part, part) for part in name.split(".")[1:]]
    for length in range(len(parts), 0, -1):
        found = ".".join(parts[:length])
        if found in SOURCES:
            return found
        if f"{found}.__init__" in SOURCES:
            return f"{found}.__init__"
    return None


def package(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_from_the_rows_above_it_only(module: str) -> None:
    for name in imports(module):
        other = ours(name)
        if other is None or package(other) == package(module):
            continue
        assert row(other) < row(module), f"{module} imports {other}"


def test_every_row_names_something_that_exists() -> None:
    for names in ROWS:
        for name in names:
            assert name in SOURCES or f"{name}.__init__" in SOURCES, name


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_driver_is_imported_in_its_place_only(driver: str) -> None:
    places = {
        module
        for module in SOURCES
        if any(name.split(".")[0] == driver for name in imports(module))
    }
    assert places <= DRIVERS[driver]


def test_rules_and_values_know_no_socket_and_no_clock() -> None:
    for module in ("protocol.messages", "protocol.startup", "errors", "tenants.model"):
        names = {name.split(".")[0] for name in imports(module)}
        assert not names & {"asyncio", "socket", "ssl", "time"}
