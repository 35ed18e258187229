"""Orders: what operators asked for that holds until they undo it.

Which databases are paused, and which take no newcomers. A process that is alone keeps
its own; over several workers the supervisor keeps them, so that one that is started
later finds them. What they mean is `router`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID


@dataclass(slots=True)
class Orders:
    """Orders by target; they outlive the pools."""

    is_paused: bool = False  # all targets
    paused: set[UUID] = field(default_factory=set)
    disabled: set[UUID] = field(default_factory=set)
    version: int = 0  # grows with each change

    def pauses(self, target_id: UUID) -> bool:
        return self.is_paused or target_id in self.paused

    def change(self, verb: str, target_id: UUID | None) -> str:
        """Take an order; return an empty text, or why there is nothing to do.

        `verb` is PAUSE, KILL, RESUME, DISABLE or ENABLE; without a target, it is for
        all, which the last two can't be.
        """
        refused = self._why_not(verb, target_id)
        if refused:
            return refused
        self.version += 1
        match verb, target_id:
            case "PAUSE" | "KILL", None:
                self.is_paused = True
            case "RESUME", None:
                self.is_paused = False
                self.paused.clear()
            case "PAUSE" | "KILL", UUID():
                self.paused.add(target_id)
            case "RESUME", UUID():
                self.paused.discard(target_id)
            case "DISABLE", UUID():
                self.disabled.add(target_id)
            case "ENABLE", UUID():
                self.disabled.discard(target_id)
        return ""

    def _why_not(self, verb: str, target_id: UUID | None) -> str:
        match verb:
            case "PAUSE" if self.is_paused or target_id in self.paused:
                return "it is paused already"
            case "RESUME" if target_id is None:
                return "" if self.is_paused or self.paused else "nothing is paused"
            case "RESUME" if self.is_paused:
                return "all databases are paused: use RESUME alone"
            case "RESUME" if target_id not in self.paused:
                return "it is not paused"
        return ""

    def dump(self) -> dict[str, Any]:
        """Return what JSON knows, for `load`."""
        return {
            "is_paused": self.is_paused,
            "paused": [str(each) for each in self.paused],
            "disabled": [str(each) for each in self.disabled],
            "version": self.version,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        return cls(
            dumped["is_paused"],
            set(map(UUID, dumped["paused"])),
            set(map(UUID, dumped["disabled"])),
            dumped["version"],
        )
