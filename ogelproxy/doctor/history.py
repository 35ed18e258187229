"""MongoDB: whether the history that is written there is kept and found."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ogelproxy.config import Usage
from ogelproxy.doctor.finding import Finding, Now, compare_clock, fail, ok, warn
from ogelproxy.errors import ConfigInvalid, HistoryUnavailable
from ogelproxy.usage.mongodb import HistoryVitals, MongoSink

SERVER = "mongodb"
#: The oldest that gets corrections in November 2026 (mongodb.com/legal/support-policy).
MIN_MAJOR = 7


async def examine(config: Usage, now: Now) -> AsyncIterator[Finding]:
    """Look at MongoDB, where it is in use."""
    if config.mongodb_url is None:
        yield ok(SERVER, "not set: the control plane keeps the history")
        return
    try:
        sink = MongoSink(config.mongodb_url, config.history_days)
    except ConfigInvalid as error:
        yield fail(SERVER, str(error), "correct usage.mongodb_url (MONGODB_URL)")
        return
    try:
        vitals = await sink.fetch_vitals()
        yield version(vitals)
        yield role(vitals)
        yield indexes(vitals)
        yield await compare_clock(f"{SERVER} clock", sink.fetch_time, now)
    except HistoryUnavailable as error:
        yield fail(
            SERVER,
            str(error),
            "see that it runs, takes connections from here, and that "
            "usage.mongodb_url (MONGODB_URL) is right; batches wait in the spool",
        )
    finally:
        sink.close()


def version(vitals: HistoryVitals) -> Finding:
    subject = f"{SERVER} version"
    text = f"MongoDB {vitals.version}"
    if int(vitals.version.partition(".")[0]) >= MIN_MAJOR:
        return ok(subject, text)
    return warn(subject, text, f"upgrade it to {MIN_MAJOR}.0 or newer")


def role(vitals: HistoryVitals) -> Finding:
    """Batches are written with the majority; alone, one machine is all of it."""
    subject = f"{SERVER} role"
    if not vitals.is_writable:
        return fail(
            subject,
            "takes no writes",
            "name all members and the replica set in usage.mongodb_url",
        )
    if vitals.is_sharded:
        return ok(subject, "router of a sharded cluster")
    if vitals.replica_set:
        return ok(subject, f"primary of the replica set {vitals.replica_set}")
    return warn(
        subject,
        "a server alone: what it has acknowledged is lost with its disk",
        "make it a replica set of three",
    )


def indexes(vitals: HistoryVitals) -> Finding:
    subject = f"{SERVER} indexes"
    if not vitals.missing:
        return ok(subject, "all there")
    return warn(
        subject,
        f"missing, or with another expiry: {', '.join(vitals.missing)}",
        "start ogelproxy with a user that may createIndex (role readWrite): it makes "
        "them with the first batch",
    )
