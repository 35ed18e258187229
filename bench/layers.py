"""The case `layers`: what limiter, fingerprint and accounting add to each query.

Each as the proxy calls it, in C: `ClientCore.pay` with its look at the clock, the
scan of a point query, and `Lendable.count`, which fills the usage row in its mapped
file and the numbers that metrics show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.table import Table

from bench import loops
from bench.case import Result
from bench.desk import Desk
from bench.exchanges import POINT_QUERY
from bench.micro import OURS, TWIN, Micro, Repeated, repeated
from tests import reference

#: Nanoseconds for all three; spec section 9 has so much for each layer alone.
TARGET = 1000.0
#: Different statements that are counted in turn.
STATEMENTS = 100

NOTHING = "nothing, called"
LIMITER = "limiter"
FINGERPRINT = "fingerprint"
ACCOUNTING = "accounting"
TOGETHER = "together, ns"
#: Of a finished point query, as `UsageTable.record` names it.
MEASURE: dict[str, Any] = {
    "sqlstate": None,
    "queries": 1,
    "refused": 0,
    "complexity": 100,
    "rows": 1,
    "bytes_in": 60,
    "bytes_out": 120,
    "server_seconds": 1e-4,
    "queue_seconds": 0.0,
    "throttled_seconds": 0.0,
}


class LayersCase(Micro):
    name = "layers"
    about = "limiter, fingerprint and accounting: what they add to a query"
    title = "Time of the layers that see each query"
    unit = "layer"
    names = (NOTHING, LIMITER, FINGERPRINT, ACCOUNTING)

    @contextmanager
    def opened(self, implementation: str) -> Iterator[Mapping[str, Repeated]]:
        text = POINT_QUERY.encode()
        if implementation == TWIN:
            yield _twins(text)
            return
        compiled = loops.load()
        with Desk() as desk:
            client, _ = desk.client(compiled.QuietClient)
            server, _ = desk.server(compiled.QuietServer)
            client.meet(server)
            yield {
                NOTHING: compiled.Nothing(),
                LIMITER: compiled.Pays(client),
                FINGERPRINT: compiled.Scans(text),
                ACCOUNTING: compiled.Counts(server, STATEMENTS),
            }

    def run(self, implementation: str, *, is_quick: bool) -> Result:
        result = super().run(implementation, is_quick=is_quick)
        result.figures[TOGETHER] = sum(
            spent for name, spent in result.figures.items() if NOTHING not in name
        )
        return result

    def tables(self, results: Sequence[Result]) -> list[Table]:
        (table,) = super().tables(results)
        for result in results:
            if result.implementation == OURS:
                is_met = result.figures[TOGETHER] <= TARGET
                verdict = "[green]met[/]" if is_met else "[red]not met[/]"
                table.title = f"{self.title}, {TARGET:,.0f} ns at most: {verdict}"
        return [table]


CASE = LayersCase()


def _twins(text: bytes) -> dict[str, Repeated]:
    bucket = reference.TokenBucket(1e12, 1e12, monotonic())
    usage = reference.UsageTwin(4 << 20)
    return {
        NOTHING: repeated(lambda: None),
        LIMITER: repeated(lambda: bucket.take(monotonic(), 1)),
        FINGERPRINT: repeated(lambda: reference.scan(text)),
        ACCOUNTING: repeated(lambda: usage.record(1, 2, **MEASURE)),
    }
