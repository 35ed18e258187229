def accept(listening: int) -> tuple[int, str, int] | None:
    """Accept the next connection of a listening TCP socket, by its descriptor.

    Return its descriptor, which blocks never and no child inherits, and the peer's
    address and port; None while nobody waits. Raises OSError.
    """
