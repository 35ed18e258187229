"""The settings on paper: the sample file and the reference page.

Both are printed from the tree in `config`, so neither can disagree with it;
a test compares docker/ogelproxy.toml and docs/configuration.md with them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from ogelproxy.config import PREFIX, WELL_KNOWN, Config, Secret, Section

SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
KINDS = {
    bool: "yes or no",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Secret: "secret",
}

SAMPLE_HEAD = """\
# Every setting of ogelproxy with its default. A line that starts with `#` and no
# blank is a setting: remove the `#` to set it. The environment goes before this
# file: pool.max_servers is OGELPROXY_POOL_MAX_SERVERS there.
"""

MANUAL_HEAD = """\
# Configuration

Settings come from their defaults, then the TOML file given with
`ogelproxy serve --config FILE`, then the environment. An unknown name or a value
out of bounds ends the start with the name of the setting. The commented sample
is [docker/ogelproxy.toml](../docker/ogelproxy.toml). This page and the sample
are printed by `python -m ogelproxy config`.

Names end in their unit: `_timeout`, `_interval`, `_ttl`, `_lifetime`, `_wait` and
`_leeway` are seconds, `_bytes` are bytes.
"""


def sample() -> str:
    """Return the commented sample file, TOML."""
    blocks = [SAMPLE_HEAD]
    for section, settings in _sections():
        lines = []
        if section is not Config:
            lines += [f"# {section.__doc__}", f"[{_name_of(section)}]"]
        for name, field in settings:
            default = _toml(field.default)
            unset = "" if default else " Unset by default."
            lines += [
                f"# {field.description}{unset}",
                f"#{name} = {default}".rstrip(),
            ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def manual() -> str:
    """Return the reference page, Markdown."""
    blocks = [MANUAL_HEAD]
    names = {setting: name for name, setting in WELL_KNOWN.items()}
    for section, settings in _sections():
        prefix = "" if section is Config else f"{_name_of(section)}."
        lines = [
            f"## {prefix.rstrip('.') or 'Without a section'}",
            "",
            "At the top of the file." if section is Config else f"{section.__doc__}",
            "",
            "| setting | type | default | bounds | environment | meaning |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, field in settings:
            setting = f"{prefix}{name}"
            variable = f"`{PREFIX}{setting.replace('.', '_').upper()}`"
            if setting in names:
                variable = f"`{names[setting]}` or {variable}"
            default = _toml(field.default)
            cells = (
                f"`{setting}`",
                _kind(field.annotation),
                f"`{default}`" if default else "unset",
                _bounds(field),
                variable,
                field.description,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _sections() -> Iterator[tuple[type[Section], list[tuple[str, FieldInfo]]]]:
    """Yield each section with its settings: first the ones without a table."""
    bare = []
    nested = []
    for name, field in Config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            nested.append((inner, list(inner.model_fields.items())))
        else:
            bare.append((name, field))
    yield Config, bare
    yield from nested


def _name_of(section: type[Section]) -> str:
    return next(
        name
        for name, field in Config.model_fields.items()
        if field.annotation is section
    )


def _toml(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            return f'"{value}"'


def _kind(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        present = [part for part in get_args(annotation) if part is not type(None)]
        return _kind(present[0])
    if get_origin(annotation) is tuple:
        return "list of networks"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    return KINDS[annotation]


def _bounds(field: FieldInfo) -> str:
    found = []
    for bound in field.metadata:
        for kind, (sign, name) in SIGNS.items():
            if isinstance(bound, kind):
                found.append(f"{sign} {getattr(bound, name)}")
    return ", ".join(found)
