"""The doctor: looks at each thing that a proxy depends on and says what to do.

Only looks: it changes nothing, and may be asked beside a running proxy. A module
per dependency, a function per question; each answers with a Finding, whose order is
that of a start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from ogelproxy.config import Config
from ogelproxy.doctor import certificate, control, history, machine, meeting, spool
from ogelproxy.doctor.finding import Finding, Now, Verdict

__all__ = ["Finding", "Verdict", "examine"]


async def examine(config: Config, now: Now = time.time) -> list[Finding]:
    """Look at all of it, the servers at once; `now` is Unix time."""
    groups = await asyncio.gather(
        _all(control.examine(config.control, config.workers, now)),
        _all(meeting.examine(config, now)),
        _all(history.examine(config.usage, now)),
    )
    return [
        *(finding for group in groups for finding in group),
        *spool.examine(config.usage, config.workers, now),
        *certificate.examine(config.tls, config.listen, now),
        *machine.examine(config),
    ]


async def _all(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]
