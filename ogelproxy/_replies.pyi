from typing import final

@final
class Replies:
    """The queue of replies that one server connection owes."""

    def __len__(self) -> int: ...
