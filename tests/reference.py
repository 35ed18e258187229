"""Slow, plain twins of the compiled parts: the oracles of the property tests."""

from __future__ import annotations

from typing import Any


class UsageTwin:
    """The usage table as dicts: rows by (payer, fingerprint), one dict per batch.

    Has no bounds, so it agrees with the table while that isn't full.
    """

    def __init__(self, work_mem_bytes: float) -> None:
        self._work_mem_bytes = work_mem_bytes
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}

    def record(
        self, payer: int, fingerprint: int, sqlstate: bytes | None, **measure: Any
    ) -> None:
        """Count one measure, named as in ``UsageTable.record``."""
        complexity = measure.pop("complexity") / 100
        parallelism = 2 if measure["rows"] > 1000 else 1
        duration = measure["server_seconds"]
        memory = (self._work_mem_bytes + measure["bytes_out"]) / 2**30
        measure["vcpu_seconds"] = duration * complexity * parallelism
        measure["memory_gib_seconds"] = duration * memory
        measure["errors"] = sqlstate is not None
        row = self._rows.setdefault((payer, fingerprint), {})
        for name, value in measure.items():
            row[name] = row.get(name, 0) + value
        row["longest_seconds"] = max(row.get("longest_seconds", 0), duration)
        row["sqlstate"] = sqlstate.decode() if sqlstate else row.get("sqlstate", "")

    def rotate(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the batch's rows, and begin anew."""
        rows, self._rows = self._rows, {}
        return rows
