"""The case `wire`: what cutting bytes into messages costs, both ways.

`ClientCore.process` and `ServerCore.process` as shipped, up to where a message is
looked into: the requests go nowhere, and answers are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bench import exchanges, loops
from bench.desk import Desk
from bench.micro import TWIN, Micro, Repeated, repeated
from tests import reference

#: Messages of a long read; with `exchanges.ROW_BYTES` a read is full with them.
ROWS = 500

REQUESTS = {
    f"{protocol} query": exchange.request
    for protocol, exchange in exchanges.POINT.items()
} | {f"COPY IN, {ROWS} rows": exchanges.copied(ROWS)}
ANSWERS = {
    f"answer, {protocol}": exchange for protocol, exchange in exchanges.POINT.items()
} | {f"answer of {ROWS} rows": exchanges.long_answer(ROWS)}


class WireCase(Micro):
    name = "wire"
    about = "cutting requests and answers into messages"
    title = "Time to cut what one read brought, and to decide what goes on"
    unit = "read"
    names = (*REQUESTS, *ANSWERS)

    @contextmanager
    def opened(self, implementation: str) -> Iterator[Mapping[str, Repeated]]:
        if implementation == TWIN:
            answers = {name: each.answer for name, each in ANSWERS.items()}
            yield {name: _cuts(data) for name, data in (REQUESTS | answers).items()}
            return
        compiled = loops.load()
        with Desk() as desk:
            client, _ = desk.client(compiled.QuietClient)
            server, _ = desk.server(compiled.QuietServer)
            client.meet(server)
            yield {
                name: compiled.Requests(client, data) for name, data in REQUESTS.items()
            } | {
                name: compiled.Answers(server, each.answer, each.asked)
                for name, each in ANSWERS.items()
            }


CASE = WireCase()


def _cuts(data: bytes) -> Repeated:
    return repeated(lambda: reference.cut(data))
