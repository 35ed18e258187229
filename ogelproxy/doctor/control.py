"""The control plane: its Postgres, its schema, and the keys to what it keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ogelproxy.config import Control
from ogelproxy.doctor.finding import Finding, Now, compare_clock, fail, ok, warn
from ogelproxy.errors import ConfigInvalid, ControlUnavailable
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from ogelproxy.tenants.vitals import Vitals

SERVER = "control plane"
#: The oldest that the schema can be made on: it uses gen_random_uuid.
MIN_MAJOR = 13
#: The oldest that gets corrections in November 2026
#: (postgresql.org/support/versioning).
MAINTAINED_MAJOR = 15
#: One speaks, one listens.
SESSIONS = 2
#: Credentials that are named when no key decrypts them.
MAX_NAMED = 3


async def examine(config: Control, workers: int, now: Now) -> AsyncIterator[Finding]:
    """Look at the control plane, as far as it can be reached."""
    if config.database_url is None:
        yield fail(SERVER, "no URL", "set control.database_url (DATABASE_URL)")
        return
    widened = config.model_copy(
        update={"max_connections": max(SESSIONS, config.max_connections)}
    )
    try:
        async with Store(widened, None) as store:
            vitals = await store.fetch_vitals()
            yield version(vitals)
            yield writable(vitals)
            yield connections(vitals, config, workers)
            yield await compare_clock(f"{SERVER} clock", store.fetch_time, now)
            yield await notify(store)
            yield migrations(vitals)
            yield await secret_key(config, store if vitals.has_schema else None)
    except (ConfigInvalid, ControlUnavailable) as error:
        yield fail(
            SERVER,
            str(error),
            "see that Postgres runs, takes connections from here, and that "
            "control.database_url (DATABASE_URL) is right",
        )


def version(vitals: Vitals) -> Finding:
    subject = f"{SERVER} version"
    text = f"Postgres {vitals.version}"
    advice = f"upgrade it to {MAINTAINED_MAJOR} or newer"
    if vitals.major < MIN_MAJOR:
        return fail(subject, text, advice)
    if vitals.major < MAINTAINED_MAJOR:
        return warn(subject, f"{text}, which gets no corrections any more", advice)
    return ok(subject, text)


def writable(vitals: Vitals) -> Finding:
    subject = f"{SERVER} writes"
    if not vitals.is_read_only:
        return ok(subject, "taken")
    return fail(
        subject,
        "refused: a standby, or default_transaction_read_only is on",
        "name the primary in control.database_url (DATABASE_URL)",
    )


def connections(vitals: Vitals, config: Control, workers: int) -> Finding:
    """Compare what is left with what the processes of one more machine take."""
    subject = f"{SERVER} connections"
    left = vitals.max_connections - vitals.used_connections
    text = f"{left} of {vitals.max_connections} left"
    wanted = workers * (config.max_connections + 1)  # the one that listens
    if left >= wanted:
        return ok(subject, text)
    return warn(
        subject,
        f"{text}; ogelproxy takes up to {wanted}",
        "raise max_connections in postgresql.conf, or lower control.max_connections",
    )


async def notify(store: Store) -> Finding:
    subject = f"{SERVER} NOTIFY"
    if await store.hears():
        return ok(subject, "heard")
    return fail(
        subject,
        "not heard: changes arrive only with control.reconcile_interval",
        "name Postgres itself in control.database_url, not a transaction pooler",
    )


def migrations(vitals: Vitals) -> Finding:
    subject = f"{SERVER} schema"
    if vitals.unknown:
        return warn(
            subject,
            f"made by a newer release ({vitals.unknown[-1]})",
            "upgrade this machine's ogelproxy",
        )
    if not vitals.pending:
        return ok(subject, "up to date")
    count = len(vitals.pending)
    text = f"{count} migrations are missing" if vitals.has_schema else "not there yet"
    if not vitals.has_schema and not vitals.may_create:
        return fail(
            subject,
            f"{text}, and the role may not make it",
            "GRANT CREATE ON DATABASE … to the role of control.database_url",
        )
    return warn(subject, text, "start ogelproxy: it migrates")


async def secret_key(config: Control, store: Store | None) -> Finding:
    """Decrypt what is stored; without a schema only see that the key is one."""
    subject = "secret key"
    advice = "set control.secret_key (O7S_SECRET_KEY) to the key that encrypted them"
    if config.secret_key is None:
        return fail(subject, "not set", "set control.secret_key (O7S_SECRET_KEY)")
    try:
        vault = Vault(config.secret_key)
    except ConfigInvalid as error:
        return fail(subject, str(error), advice)
    tried, unreadable = (0, []) if store is None else await store.list_unreadable(vault)
    if not tried:
        return ok(subject, "well-formed; nothing is stored yet to try it on")
    if not unreadable:
        return ok(subject, f"decrypts all {tried} stored connection strings")
    named = ", ".join(unreadable[:MAX_NAMED])
    more = ", …" if len(unreadable) > MAX_NAMED else ""
    return fail(
        subject,
        f"does not decrypt {len(unreadable)} of {tried} stored connection strings: "
        f"{named}{more}",
        f"{advice}, also behind a newer one, separated by a comma",
    )
