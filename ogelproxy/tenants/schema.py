"""The scripts that make the schema `platform`, in their order."""

from __future__ import annotations

import re
from importlib.resources import files

MIGRATION_NAME = re.compile(r"(\d{4})_\w+\.sql")


def scripts() -> list[tuple[str, str]]:
    """Return the name and the text of each, the oldest first."""
    return sorted(
        (script.name, script.read_text(encoding="utf-8"))
        for script in files("ogelproxy.tenants").joinpath("migrations").iterdir()
        if MIGRATION_NAME.fullmatch(script.name)
    )
