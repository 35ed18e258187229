from typing import final

def split(data: bytes, limit: int = ...) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Cut `data` into messages of the protocol.

    Returns the whole messages as (type, body) and the bytes left over. Raises
    ProtocolViolation for a length that can't be (manual 55.2.1).
    """

@final
class Gather: ...
