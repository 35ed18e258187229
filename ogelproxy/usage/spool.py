"""The spool: batch files of this node, from their making to their removal.

Owns one directory: who may use it, the node's id, the numbers of batches, and
how a batch file is laid out for a reader. Does not know what is counted or who
wants it: `_usage` writes the open file, `Meter` hands closed ones to the sinks.

A batch file is one header and then slots of 128 bytes, little-endian; the
structs are declared in ``_usage.pxd``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from ogelproxy.errors import SpoolUnusable

logger = logging.getLogger(__name__)

MAGIC = b"O7SUSAGE"
LAYOUT = 1
SLOT_BYTES = 128
PAYER_SLOTS = 2  # of the record; its row of rest is a row like any other
KIND_PAYER = 1
KIND_ROW = 2

HEADER = struct.Struct("<8sIIQd16s80x")
PAYER = struct.Struct("<B3x16s60s32s16s64s64s")
ROW = struct.Struct("<B5s2xIf7Q7d")

#: Share of `max_bytes` from which the spool calls itself nearly full.
NEARLY_FULL = 0.8

#: ``node``: the id and the latest number. Of one length, so that writing it anew
#: needs no space and, within one sector, is done wholly or not at all.
NODE = re.compile(rb"([0-9a-f-]{36}) ([0-9]{10})\n")
BATCH_NAME = re.compile(r"([0-9]{10})\.batch")
#: Numbers fit 32 bits (`_usage`): a batch each second lasts 136 years.
MAX_NUMBER = 2**32 - 2


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays for a row."""

    org_id: UUID
    handle: str
    tier: str
    database_type: str
    database: str
    application_name: str


@dataclass(frozen=True, slots=True)
class Row:
    """What one payer used by one statement in one batch.

    `vcpu_seconds` and `memory_gib_seconds` are estimates, see `UsageTable`.
    """

    slot: int  # its place in the file, unique within the batch
    payer: Payer
    fingerprint: int  # 0: not told apart
    queries: int
    refused: int
    errors: int
    sqlstate: str  # of the latest error, or empty
    rows: int
    bytes_in: int
    bytes_out: int
    server_seconds: float
    queue_seconds: float
    throttled_seconds: float
    vcpu_seconds: float
    memory_gib_seconds: float
    longest_seconds: float
    first_at: float  # Unix time
    last_at: float  # Unix time


@dataclass(frozen=True, slots=True)
class Batch:
    """One closed batch. `node` and `number` together never come twice."""

    node: UUID
    number: int
    opened_at: float  # Unix time
    rows: tuple[Row, ...]
    unreadable: int = 0  # rows whose payer never reached the disk

    @property
    def id(self) -> str:
        """Return the same text for the same batch, whoever reads it and when."""
        return f"{self.node}-{self.number}"

    def row_id(self, row: Row) -> str:
        """Return the same text for the same row of the same batch."""
        return f"{self.id}-{row.slot}"


def read_batch(path: Path) -> Batch:
    """Read a batch file, whole or as a killed process left it.

    Slots that were not finished are passed over. Raises SpoolUnusable for a file
    that is no batch of this layout, and OSError.
    """
    data = path.read_bytes()
    if len(data) < SLOT_BYTES:
        raise SpoolUnusable(f"{path} is too short for a batch")
    magic, layout, _, number, opened_at, node = HEADER.unpack_from(data)
    if magic != MAGIC or layout != LAYOUT:
        raise SpoolUnusable(f"{path} is no batch of layout {LAYOUT}")
    payers: dict[int, Payer] = {}
    rows: list[Row] = []
    unreadable = 0
    slot = 1
    # A batch that was not closed is as long as it could have become.
    end = len(data.rstrip(b"\0"))
    while slot * SLOT_BYTES < end and (slot + 1) * SLOT_BYTES <= len(data):
        at = slot * SLOT_BYTES
        kind = data[at]
        if kind == KIND_PAYER and at + PAYER.size <= len(data):
            payers[slot] = _payer(data, at)
            slot += PAYER_SLOTS
            continue
        if kind == KIND_ROW:
            row = _row(data, at, slot, payers)
            if row is None:
                unreadable += 1
            elif row.first_at:  # something was counted in it
                rows.append(row)
        slot += 1
    return Batch(UUID(bytes=node), number, opened_at, tuple(rows), unreadable)


def read_pairs(pairs: Iterable[tuple[bytes, bytes]]) -> list[Row]:
    """Read pairs of payer and row, as `UsageTable` hands them out; slots are 0."""
    rows = []
    for payer, row in pairs:
        payers = {ROW.unpack(row)[2]: _payer(payer, 0)}
        read = _row(row, 0, 0, payers)
        assert read is not None
        rows.append(read)
    return rows


def _payer(data: bytes, at: int) -> Payer:
    _, organisation, *texts = PAYER.unpack_from(data, at)
    return Payer(
        UUID(bytes=organisation),
        *(text.rstrip(b"\0").decode("utf-8", "replace") for text in texts),
    )


def _row(data: bytes, at: int, slot: int, payers: dict[int, Payer]) -> Row | None:
    fields = ROW.unpack_from(data, at)
    _, sqlstate, payer_slot, longest, fingerprint, *sums = fields
    payer = payers.get(payer_slot)
    if payer is None:
        return None
    queries, refused, errors, rows, bytes_in, bytes_out, *seconds = sums
    server, queue, throttled, vcpu, memory, first_at, last_at = seconds
    return Row(
        slot=slot,
        payer=payer,
        fingerprint=fingerprint,
        queries=queries,
        refused=refused,
        errors=errors,
        sqlstate=sqlstate.rstrip(b"\0").decode("ascii", "replace"),
        rows=rows,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        server_seconds=server,
        queue_seconds=queue,
        throttled_seconds=throttled,
        vcpu_seconds=vcpu,
        memory_gib_seconds=memory,
        longest_seconds=longest,
        first_at=first_at,
        last_at=last_at or first_at,
    )


class Spool:
    """The batch files of one process, in a directory that it alone uses.

    All methods block on the disk; no two may run at the same time.
    `file_bytes` is the size of an open batch, `max_bytes` of all together.
    """

    def __init__(self, directory: Path, max_bytes: int, file_bytes: int) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._file_bytes = file_bytes
        self._lock = -1  # descriptor of ``node``, locked; -1 while closed
        self._node = UUID(int=0)
        self._latest = 0  # number of the newest batch, here or long delivered
        self._writing: set[Path] = set()  # opened and not yet sealed

    @property
    def node(self) -> UUID:
        """The id of this directory, part of every batch's."""
        return self._node

    def open(self) -> None:
        """Take the directory, see `take`. Raises SpoolUnusable, also when taken."""
        if not self.take():
            raise SpoolUnusable(
                f"{self.directory} is in use by another process; "
                "each needs a usage.spool_dir of its own"
            )

    def take(self) -> bool:
        """Take the directory, made if need be; what a kill left counts as closed.

        Returns whether it could: another process may have it. Raises SpoolUnusable
        when it isn't a spool's or can't be read and written.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(
                self.directory / "node", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise SpoolUnusable(f"{self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(lock)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError as error:
            os.close(lock)
            raise SpoolUnusable(f"{self.directory}: {error.strerror}") from error
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return True

    def _read(self, lock: int) -> None:
        if 2 * self._file_bytes > self._max_bytes:
            raise SpoolUnusable(
                f"usage.max_spool_bytes is too little for two batches of "
                f"{self._file_bytes} bytes, which usage.max_rows asks for"
            )
        written = os.pread(lock, 64, 0)
        if not written:
            self._node = uuid4()
            self._latest = 0
        elif known := NODE.fullmatch(written):
            self._node = UUID(known[1].decode())
            self._latest = int(known[2])
        else:
            raise SpoolUnusable(f"{self.directory / 'node'} is not a spool's")
        self._latest = max([self._latest, *map(_number, self.closed())])
        for unborn in self.directory.glob("*.new"):
            unborn.unlink()

    def close(self) -> None:
        """Give the directory up; unsealed batches are closed ones to the next."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._writing.clear()

    def open_batch(self) -> Path:
        """Make the next batch file, with all its space reserved.

        Raises OSError when the disk is full, SpoolUnusable when the spool is;
        the numbers go on either way.
        """
        if self.used_bytes() + self._file_bytes > self._max_bytes:
            raise SpoolUnusable(f"{self.directory} has reached usage.max_spool_bytes")
        if self._latest >= MAX_NUMBER:
            raise SpoolUnusable(f"{self.directory} has used up its batch numbers")
        self._latest += 1
        # The number is on disk before anything bears it: it can't come twice.
        os.pwrite(
            self._lock, b"%s %010d\n" % (str(self._node).encode(), self._latest), 0
        )
        os.fsync(self._lock)
        path = self.directory / f"{self._latest:010d}.batch"
        unborn = path.with_suffix(".new")
        header = HEADER.pack(
            MAGIC,
            LAYOUT,
            self._file_bytes // SLOT_BYTES,
            self._latest,
            time.time(),
            self._node.bytes,
        )
        try:
            with unborn.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                # Without its space, a full disk would be SIGBUS while counting.
                os.posix_fallocate(file.fileno(), 0, self._file_bytes)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            self._writing.add(path)
            unborn.rename(path)
            self._sync_directory()
        except BaseException:
            self._writing.discard(path)
            for leftover in (unborn, path):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            raise
        return path

    def sync(self, path: Path) -> None:
        """Write what was counted so far to the disk (Linux: maps included)."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def seal(self, path: Path, used_bytes: int) -> None:
        """Close a batch that is no longer mapped; an empty one is removed.

        The batch is closed even if giving back its space fails, which is logged.
        """
        try:
            if used_bytes <= SLOT_BYTES:
                path.unlink()
            else:
                os.truncate(path, used_bytes)
                self.sync(path)
        except OSError as error:
            logger.warning("usage batch %s was not trimmed: %s", path.name, error)
        self._writing.discard(path)

    def closed(self) -> list[Path]:
        """Return the closed batches, oldest first."""
        return sorted(
            path
            for path in self.directory.glob("*.batch")
            if BATCH_NAME.fullmatch(path.name) and path not in self._writing
        )

    def remove(self, path: Path) -> None:
        """Forget a delivered batch."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> None:
        """Keep a file that can't be read out of the way, for a person to see."""
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_suffix(".unreadable"))

    def used_bytes(self) -> int:
        """Return the bytes of all files, unreadable ones included."""
        total = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                # Another thread's file may go between the two calls.
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total

    def is_nearly_full(self) -> bool:
        """Whether four fifths of `max_bytes` are in use."""
        return self.used_bytes() >= NEARLY_FULL * self._max_bytes

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _number(path: Path) -> int:
    return int(path.stem)
