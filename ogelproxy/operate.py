"""The operators' commands: organisations, keys, databases, tiers, usage.

Each command is one call of `tenants.Store`, shown as a table or as JSON. The
control plane is named by its URL or by the state directory of a dev stack. What
goes wrong is one sentence and exit code 1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import functools
import getpass
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.config import Control, Secret
from ogelproxy.errors import ConfigInvalid, OgelError
from ogelproxy.tenants.model import DatabaseType, LimiterMode, PoolMode
from ogelproxy.tenants.operations import TIER_LIMITS
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from ogelproxy.usage.mongodb import MongoHistory

#: Wider than any row: what is piped to a program is not to be wrapped.
PIPED_COLUMNS = 1000

Command = Callable[..., Awaitable["Answer"]]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a command found or did: `data` for programs, `text` for people.

    Without a text, `data` is shown: records, or lists of records by title.
    """

    data: Any
    text: str | None = None
    has_few: bool = False  # few records of many fields


def operation(command: Command) -> Callable[..., None]:
    """Make a click callback of a coroutine that takes an open Store."""

    @click.option(
        "--database-url",
        envvar="DATABASE_URL",
        show_envvar=True,
        help="The control plane's Postgres.",
    )
    @click.option(
        "--state",
        type=click.Path(path_type=Path),
        help="State directory of a dev stack, instead of the URL.",
    )
    @click.option("--json", "is_json", is_flag=True, help="Print JSON.")
    @functools.wraps(command)
    def callback(
        database_url: str | None, state: Path | None, is_json: bool, **params: Any
    ) -> None:
        async def run(control: Control) -> Answer:
            key = control.secret_key
            async with Store(control, None if key is None else Vault(key)) as store:
                return await command(store, **params)

        try:
            answer = asyncio.run(run(_control(state, database_url)))
        except OgelError as error:
            raise click.ClickException(str(error)) from error
        _show(answer, is_json=is_json)

    return callback


def _control(state: Path | None, database_url: str | None) -> Control:
    """Return the settings of the control plane; raises ConfigInvalid."""
    if state is None:
        if not database_url:
            raise ConfigInvalid(
                "which control plane? Give --database-url, DATABASE_URL or --state"
            )
        secret_key = os.environ.get("O7S_SECRET_KEY")
        return Control(
            database_url=Secret(database_url),
            secret_key=Secret(secret_key) if secret_key else None,
        )
    kept = _kept(state)
    return Control(
        database_url=Secret(kept["database_url"]), secret_key=Secret(kept["secret_key"])
    )


def _kept(state: Path) -> dict[str, Any]:
    """Return what a dev stack keeps in its directory; raises ConfigInvalid."""
    path = state / "secrets.json"
    try:
        kept = orjson.loads(path.read_bytes())
        if not {"database_url", "secret_key"} <= kept.keys():
            raise KeyError
    except OSError as error:
        raise ConfigInvalid(
            f"--state {state}: no dev stack there ({error.strerror})"
        ) from None
    except (ValueError, KeyError, AttributeError):
        # Without the reason: it would quote what the file holds.
        raise ConfigInvalid(f"{path} is not a dev stack's") from None
    return dict(kept)


def _actor() -> str:
    """Return who operates, for the audit."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # no such user, as in many containers
        return f"cli:uid-{os.getuid()}"


def _secret_from(text: str) -> Secret:
    """Return a connection string as given, or from standard input for ``-``."""
    return Secret(sys.stdin.readline().strip() if text == "-" else text)


def _show(answer: Answer, *, is_json: bool) -> None:
    if is_json:
        # str: the driver's UUIDs are of a subclass, which orjson does not take.
        click.echo(orjson.dumps(answer.data, str, orjson.OPT_INDENT_2))
        return
    if answer.text is not None:
        click.echo(answer.text)
        return
    console = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
    if isinstance(answer.data, Mapping):
        for title, rows in answer.data.items():
            click.echo(title)
            _show_table(console, rows, has_few=len(rows) == 1)
    else:
        _show_table(console, answer.data, has_few=answer.has_few)


def _show_table(console: Console, records: Sequence[Any], *, has_few: bool) -> None:
    """Print a record per row, or a record per column if they are few."""
    if not records:
        click.echo("none")
        return
    names = [field.name for field in dataclasses.fields(records[0])]
    lines = [
        [name.replace("_", " "), *(_cell(getattr(record, name)) for record in records)]
        for name in names
    ]
    if not has_few:
        lines = list(map(list, zip(*lines, strict=True)))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    # Text: names are not to be read as markup.
    for title in lines[0]:
        table.add_column(Text(title), overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console.print(table)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.6g}"
        case datetime.datetime():
            return value.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        case tuple():
            return ", ".join(map(str, value))
    return str(value)


handle_argument = click.argument("handle", metavar="ORGANISATION")
dsn_option = click.option(
    "--dsn",
    required=True,
    envvar="O7S_TARGET_DSN",
    show_envvar=True,
    help="Connection string; - reads it from standard input, unseen by ps.",
)


@click.group()
def org() -> None:
    """Organisations: who they are and what they may."""


@org.command("create")
@handle_argument
@click.option("--name", help="Display name; the handle without one.")
@click.option("--tier", default="free", show_default=True)
@operation
async def create_org(store: Store, handle: str, name: str | None, tier: str) -> Answer:
    """Create an organisation."""
    await store.create_organization(handle, name or handle, tier, actor=_actor())
    return Answer(
        await store.fetch_organization(handle), f"{handle} created in tier {tier}"
    )


@org.command("list")
@operation
async def list_orgs(store: Store) -> Answer:
    """List all organisations."""
    return Answer(await store.list_organizations())


@org.command("show")
@handle_argument
@operation
async def show_org(store: Store, handle: str) -> Answer:
    """Show an organisation with its keys and databases."""
    return Answer(
        {
            "organization": [await store.fetch_organization(handle)],
            "keys": await store.list_keys(handle),
            "databases": await store.list_databases(handle),
        }
    )


@org.command("set-tier")
@handle_argument
@click.argument("tier")
@click.option("--force", is_flag=True, help="Also down within 24 h of the last move.")
@operation
async def set_tier(store: Store, handle: str, tier: str, force: bool) -> Answer:
    """Move an organisation to another tier."""
    await store.set_tier(handle, tier, force=force, actor=_actor())
    return Answer(await store.fetch_organization(handle), f"{handle} is in tier {tier}")


@org.command("suspend")
@handle_argument
@operation
async def suspend(store: Store, handle: str) -> Answer:
    """Refuse an organisation's connections and end the open ones."""
    await store.suspend(handle, actor=_actor())
    return Answer(await store.fetch_organization(handle), f"{handle} is suspended")


@org.command("resume")
@handle_argument
@operation
async def resume(store: Store, handle: str) -> Answer:
    """Let a suspended organisation in again."""
    await store.resume(handle, actor=_actor())
    return Answer(await store.fetch_organization(handle), f"{handle} is active")


@org.command("set-limiter")
@handle_argument
@click.argument("mode", type=click.Choice([*map(str, LimiterMode)]))
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 300),
    default=0.0,
    show_default=True,
    help="Seconds that a query may wait for its turn.",
)
@operation
async def set_limiter(store: Store, handle: str, mode: str, max_wait: float) -> Answer:
    """Set what happens to queries over the rate: enforce, warn or off."""
    await store.set_limiter(handle, LimiterMode(mode), max_wait, actor=_actor())
    return Answer(
        await store.fetch_organization(handle),
        f"the limiter of {handle} is set to {mode}, waiting {max_wait:g} s",
    )


@org.command("set-connections")
@handle_argument
@click.argument("maximum", type=click.IntRange(0, 1_000_000), required=False)
@operation
async def set_connections(store: Store, handle: str, maximum: int | None) -> Answer:
    """Give an organisation a maximum of connections; without a number its tier's."""
    await store.set_connections(handle, maximum, actor=_actor())
    number = "as many connections as its tier" if maximum is None else f"{maximum}"
    return Answer(await store.fetch_organization(handle), f"{handle} may open {number}")


@click.group()
def key() -> None:
    """API keys of organisations."""


@key.command("create")
@handle_argument
@click.option("--name", default="default", show_default=True, help="To tell it by.")
@operation
async def create_key(store: Store, handle: str, name: str) -> Answer:
    """Create an API key and show it, this once."""
    secret = apikey.generate()
    stored_key, server_key = make_verifier(secret, *await store.fetch_scram(handle))
    made = await store.create_key(
        handle, name, stored_key, server_key, apikey.prefix(secret), actor=_actor()
    )
    return Answer(
        {"id": made.id, "handle": handle, "name": name, "secret": secret},
        f"{secret}\nThis is the key {name} of {handle}; it can't be shown again.",
    )


@key.command("list")
@handle_argument
@operation
async def list_keys(store: Store, handle: str) -> Answer:
    """List an organisation's keys, revoked ones too."""
    return Answer(await store.list_keys(handle))


@key.command("revoke")
@handle_argument
@click.argument("key_id", metavar="ID", type=click.UUID)
@operation
async def revoke_key(store: Store, handle: str, key_id: UUID) -> Answer:
    """End a key and the connections that it opened."""
    await store.revoke_key(handle, key_id, actor=_actor())
    return Answer({"id": key_id, "handle": handle}, f"key {key_id} is revoked")


@click.group("operator-key")
def operator_key() -> None:
    """Keys of the operators' console, the database `ogel`."""


@operator_key.command("create")
@click.option("--name", default="default", show_default=True, help="To tell it by.")
@operation
async def create_operator_key(store: Store, name: str) -> Answer:
    """Create an operator's key and show it, this once."""
    secret = apikey.generate()
    verifier = make_verifier(secret, *await store.fetch_operator_scram())
    key_id = await store.create_operator_key(
        name, *verifier, apikey.prefix(secret), actor=_actor()
    )
    return Answer(
        {"id": key_id, "name": name, "secret": secret},
        f"{secret}\nThis is the operator key {name}; it can't be shown again.",
    )


@operator_key.command("list")
@operation
async def list_operator_keys(store: Store) -> Answer:
    """List the operators' keys, revoked ones too."""
    return Answer(await store.list_operator_keys())


@operator_key.command("revoke")
@click.argument("key_id", metavar="ID", type=click.UUID)
@operation
async def revoke_operator_key(store: Store, key_id: UUID) -> Answer:
    """End an operator's key and the consoles that it opened."""
    await store.revoke_operator_key(key_id, actor=_actor())
    return Answer({"id": key_id}, f"operator key {key_id} is revoked")


@click.group()
def db() -> None:
    """Databases of organisations."""


@db.command("create")
@handle_argument
@click.argument("name")
@click.option(
    "--type",
    "database_type",
    type=click.Choice([*map(str, DatabaseType)]),
    default=str(DatabaseType.POSTGRES),
    show_default=True,
)
@click.option(
    "--pool-mode",
    type=click.Choice([*map(str, PoolMode)]),
    default=str(PoolMode.AUTO),
    show_default=True,
)
@dsn_option
@operation
async def create_db(
    store: Store,
    handle: str,
    name: str,
    database_type: str,
    pool_mode: str,
    dsn: str,
) -> Answer:
    """Route a database name of an organisation to a connection string."""
    made = await store.create_database(
        handle,
        name,
        DatabaseType(database_type),
        _secret_from(dsn),
        PoolMode(pool_mode),
        actor=_actor(),
    )
    return Answer(made, f"database {name} of {handle} created")


@db.command("list")
@handle_argument
@operation
async def list_dbs(store: Store, handle: str) -> Answer:
    """List an organisation's databases, dropped ones too."""
    return Answer(await store.list_databases(handle))


@db.command("set-dsn")
@handle_argument
@click.argument("name")
@dsn_option
@operation
async def set_dsn(store: Store, handle: str, name: str, dsn: str) -> Answer:
    """Give a database another connection string."""
    await store.set_dsn(handle, name, _secret_from(dsn), actor=_actor())
    return Answer(
        {"handle": handle, "name": name}, f"database {name} of {handle} redirected"
    )


@db.command("drop")
@handle_argument
@click.argument("name")
@operation
async def drop_db(store: Store, handle: str, name: str) -> Answer:
    """Stop routing to a database; its data stays."""
    await store.drop_database(handle, name, actor=_actor())
    return Answer(
        {"handle": handle, "name": name}, f"database {name} of {handle} dropped"
    )


@db.command("reencrypt")
@operation
async def reencrypt(store: Store) -> Answer:
    """Encrypt all connection strings with the first of O7S_SECRET_KEY's keys."""
    count = await store.reencrypt(actor=_actor())
    return Answer({"count": count}, f"{count} connection strings re-encrypted")


@click.group()
def tier() -> None:
    """Tiers: what plans allow and cost."""


@tier.command("list")
@operation
async def list_tiers(store: Store) -> Answer:
    """List all tiers."""
    return Answer(await store.list_tiers(), has_few=True)


@tier.command("set")
@click.argument("name", metavar="TIER")
@click.argument("limit", type=click.Choice(list(TIER_LIMITS)))
@click.argument("value")
@operation
async def set_tier_limit(store: Store, name: str, limit: str, value: str) -> Answer:
    """Set a limit of a tier, for all its organisations; `none` for no limit."""
    await store.set_tier_limit(
        name, limit, None if value == "none" else value, actor=_actor()
    )
    return Answer(
        {"tier": name, "limit": limit, "value": value},
        f"{limit} of tier {name} is {value}",
    )


@click.group()
def usage() -> None:
    """What organisations used."""


def period(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the days it looks at."""
    since = click.option(
        "--since",
        type=click.DateTime(["%Y-%m-%d"]),
        help="First day (UTC); the month's first without it.",
    )
    until = click.option(
        "--until",
        type=click.DateTime(["%Y-%m-%d"]),
        help="Last day (UTC); today without it.",
    )
    return since(until(command))


def _days(
    since: datetime.datetime | None, until: datetime.datetime | None
) -> tuple[datetime.datetime, datetime.datetime]:
    """Return the begin of the first day and the end of the last."""
    today = datetime.datetime.now(datetime.UTC)
    first = since or today.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last = (until or today).replace(tzinfo=datetime.UTC)
    return first.replace(tzinfo=datetime.UTC), last + datetime.timedelta(days=1)


@usage.command("show")
@click.argument("handle", metavar="[ORGANISATION]", required=False)
@period
@operation
async def show_usage(
    store: Store,
    handle: str | None,
    since: datetime.datetime | None,
    until: datetime.datetime | None,
) -> Answer:
    """Show usage per organisation, day and database type."""
    return Answer(await store.fetch_usage(handle, *_days(since, until)))


@usage.command("history")
@click.argument("handle", metavar="[ORGANISATION]", required=False)
@period
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="Rows shown.",
)
@click.option(
    "--mongodb-url",
    envvar="MONGODB_URL",
    show_envvar=True,
    help="MongoDB, if the history is there; a dev stack knows its own.",
)
@operation
async def show_history(
    store: Store,
    handle: str | None,
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    limit: int,
    mongodb_url: str | None,
) -> Answer:
    """Show usage per database, application and statement, the costliest first."""
    org_id = await store.find_id(handle)
    state = click.get_current_context().params["state"]
    url = mongodb_url if state is None else _kept(state).get("mongodb_url")
    if not url:
        return Answer(await store.fetch_history(org_id, *_days(since, until), limit))
    mongodb = MongoHistory(Secret(url))
    try:
        return Answer(await mongodb.fetch_history(org_id, *_days(since, until), limit))
    finally:
        mongodb.close()
