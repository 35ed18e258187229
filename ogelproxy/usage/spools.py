"""Spools: the one that a process writes, and those that others left.

Workers of one machine share `usage.spool_dir`: each writes the first of its
directories ``worker-1``, ``worker-2``… that nobody has. A process that is alone
writes the directory itself. What lies in a directory that nobody has any more is
adopted by whoever finds it first, and delivered as what it is: batches keep their
node and number, so that nothing is counted twice.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from ogelproxy.errors import SpoolUnusable
from ogelproxy.usage.spool import Spool

logger = logging.getLogger(__name__)

#: Directories that are tried for a worker's own: those of workers that drain are
#: taken too.
MAX_DIRECTORIES = 4096


class Spools:
    """The spools that one process has: its own, and adopted ones.

    Methods are those of Spool and block on the disk; no two may run at once.
    """

    def __init__(
        self, directory: Path, max_bytes: int, file_bytes: int, *, is_shared: bool
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._file_bytes = file_bytes
        self._is_shared = is_shared
        self._own = self._spool(directory)  # another one from `open` on, if shared
        self._adopted: dict[Path, Spool] = {}  # by directory

    def _spool(self, directory: Path) -> Spool:
        return Spool(directory, self._max_bytes, self._file_bytes)

    def open(self) -> None:
        """Take a directory to write, see `Spool.open`."""
        if not self._is_shared:
            self._own.open()
            return
        for number in range(1, MAX_DIRECTORIES):
            self._own = self._spool(self._directory / f"worker-{number}")
            if self._own.take():
                return
        raise SpoolUnusable(f"{self._directory} has no directory that is free")

    def adopt(self) -> bool:
        """Take the directories with batches that nobody has; say if there are any."""
        self._release()
        found = False
        for directory in (self._directory, *self._directory.glob("worker-*")):
            if directory == self._own.directory or directory in self._adopted:
                continue
            if not any(directory.glob("*.batch")):
                continue
            spool = self._spool(directory)
            try:
                if not spool.take():
                    continue
            except SpoolUnusable as error:
                logger.error("usage is left where it lies: %s", error)
                continue
            logger.warning("usage in %s was left behind: adopted", directory)
            self._adopted[directory] = spool
            found = True
        return found

    def _release(self) -> None:
        """Give up adopted directories that are empty: others may write there."""
        for directory, spool in list(self._adopted.items()):
            if not spool.closed():
                spool.close()
                del self._adopted[directory]

    def close(self) -> None:
        for spool in (self._own, *self._adopted.values()):
            spool.close()
        self._adopted.clear()

    def open_batch(self) -> Path:
        return self._own.open_batch()

    def sync(self, path: Path) -> None:
        self._own.sync(path)

    def seal(self, path: Path, used_bytes: int) -> None:
        self._own.seal(path, used_bytes)

    def closed(self) -> list[Path]:
        """Return the closed batches of all, oldest first within each."""
        spools = (self._own, *self._adopted.values())
        return list(itertools.chain.from_iterable(spool.closed() for spool in spools))

    def remove(self, path: Path) -> None:
        self._own.remove(path)

    def set_aside(self, path: Path) -> None:
        self._own.set_aside(path)

    def used_bytes(self) -> int:
        """Return the bytes of all files of its own directory."""
        return self._own.used_bytes()

    def is_nearly_full(self) -> bool:
        return self._own.is_nearly_full()
