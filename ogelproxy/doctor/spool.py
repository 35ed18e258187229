"""The spool's directory: whether usage can be written, and is taken away."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ogelproxy._usage import UsageTable
from ogelproxy.config import Usage
from ogelproxy.doctor.finding import Finding, Now, fail, ok, warn
from ogelproxy.usage.journal import MAX_BYTES, MAX_FILE_BYTES
from ogelproxy.usage.spool import NEARLY_FULL

SUBJECT = "spool"
#: File systems that a restart of the machine empties.
FLEETING = frozenset({"tmpfs", "ramfs"})
#: File systems on which a lock, or a mapped file, is not what it is on a disk.
REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs"})
#: Batches that wait longer than so many intervals are not being taken.
MAX_INTERVALS = 30
MEBIBYTE = 1024 * 1024


def examine(config: Usage, workers: int, now: Now) -> Iterator[Finding]:
    """Look at the directory, or at where it will be made."""
    directory = config.spool_dir.absolute()
    there = next(
        path for path in (directory, *directory.parents) if os.path.exists(path)
    )
    yield writable(directory, there)
    yield file_system(there)
    files = _files((*directory.glob("*"), *directory.glob("worker-*/*")))
    sizes = Counter[Path]()
    for path, count, _ in files:
        sizes[path.parent] += count
    yield space(config, there, workers * config.max_spool_bytes - sizes.total())
    # Each process has a directory, and each directory as much room.
    yield size(config, max(sizes.values(), default=0))
    if files:
        yield backlog(config, files, now())
    yield events(directory / "events")


def writable(directory: Path, there: Path) -> Finding:
    subject = f"{SUBJECT} directory"
    try:
        # Without a name: a running proxy never sees it.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as error:
        return fail(
            subject,
            f"{there}: {error.strerror}",
            "let the user that ogelproxy runs as write there, or set usage.spool_dir",
        )
    if there != directory:
        return ok(subject, f"{directory} will be made")
    return ok(subject, f"{directory} is writable")


def file_system(there: Path) -> Finding:
    subject = f"{SUBJECT} file system"
    kind = _kind(there)
    if kind in FLEETING:
        return warn(
            subject,
            f"{kind}: a restart of the machine loses what no sink has taken",
            "set usage.spool_dir to a directory on a disk",
        )
    if kind in REMOTE:
        return warn(
            subject,
            f"{kind}: locks and mapped files are not to be relied on",
            "set usage.spool_dir to a directory on a local disk",
        )
    return ok(subject, kind)


def space(config: Usage, there: Path, wanted: int) -> Finding:
    """Compare what the disk has with what the spool may still take."""
    subject = f"{SUBJECT} disk"
    status = os.statvfs(there)
    free = status.f_bavail * status.f_frsize
    text = f"{_size(free)} free"
    if free < 2 * UsageTable(config.max_rows).file_bytes:
        return fail(subject, f"{text}: no room for two batches", "free disk space")
    if free < wanted:
        return warn(
            subject,
            f"{text}, and the spool may take {_size(wanted)} more",
            "free disk space or lower usage.max_spool_bytes",
        )
    return ok(subject, text)


def size(config: Usage, used: int) -> Finding:
    subject = f"{SUBJECT} size"
    text = f"{_size(used)} of {_size(config.max_spool_bytes)}"
    advice = "see why the sink takes no batches, or raise usage.max_spool_bytes"
    if used + UsageTable(config.max_rows).file_bytes > config.max_spool_bytes:
        return fail(subject, f"{text}: no room for a batch, usage is lost", advice)
    if used >= NEARLY_FULL * config.max_spool_bytes:
        return warn(subject, text, advice)
    return ok(subject, text)


def backlog(config: Usage, files: list[tuple[Path, int, float]], now: float) -> Finding:
    """Look for batches that nobody takes and for files that nobody can read."""
    subject = f"{SUBJECT} backlog"
    unreadable = [path for path, _, _ in files if path.suffix == ".unreadable"]
    if unreadable:
        return warn(
            subject,
            f"{len(unreadable)} unreadable files, as {unreadable[0]}",
            "look at them and remove them",
        )
    written = [at for path, _, at in files if path.suffix == ".batch"]
    oldest = max(now - min(written, default=now), 0.0)
    text = f"{len(written)} batches, the oldest last written {oldest:,.0f} s ago"
    if oldest > MAX_INTERVALS * config.batch_interval:
        return warn(
            subject,
            text,
            "see that a proxy runs on the directory and that its sink takes batches",
        )
    return ok(subject, text)


def events(directory: Path) -> Finding:
    """Compare the events that wait for a sink with the room there is for them."""
    subject = f"{SUBJECT} events"
    used = sum(size for _, size, _ in _files(directory.glob("*.events")))
    text = f"{_size(used)} of {_size(MAX_BYTES)}"
    advice = "see why the sink takes no events"
    if used + MAX_FILE_BYTES > MAX_BYTES:
        return fail(subject, f"{text}: the audit is lost", advice)
    if used >= MAX_BYTES // 2:
        return warn(subject, f"{text}: analytics are left out from half of it", advice)
    return ok(subject, text)


def _files(paths: Iterable[Path]) -> list[tuple[Path, int, float]]:
    """Return path, bytes and time of the last change of those that are files."""
    found = []
    for path in sorted(paths):
        try:
            status = path.stat()
        except OSError:
            continue  # delivered meanwhile, or not ours to see
        if path.is_file():
            found.append((path, status.st_size, status.st_mtime))
    return found


def _kind(path: Path) -> str:
    """Return the kind of file system that a path is on (proc(5), mountinfo)."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"


def _size(count: int) -> str:
    return f"{count / MEBIBYTE:,.1f} MiB"
