"""The operators' commands against a real control plane, as people type them."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet

from ogelproxy import operate
from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.config import Control, Secret
from ogelproxy.tenants.model import OPERATORS, Tenant
from ogelproxy.tenants.store import Store
from ogelproxy.tenants.vault import Vault
from ogelproxy.usage import Batch, Payer, PostgresSink, Row
from ogelproxy.usage.mongodb import MongoSink
from tests.fixtures.mongodb import Mongo
from tests.fixtures.postgres import Postgres

GROUPS = {
    group.name: group
    for group in (
        operate.org,
        operate.key,
        operate.operator_key,
        operate.db,
        operate.tier,
        operate.usage,
    )
}
KEY = "a passphrase of operators"
DSN = "postgresql://role:hunter22@10.0.0.1/db"


class Terminal:
    """Types commands and reads what they print."""

    def __init__(self, url: str) -> None:
        self.url = url
        # An empty one counts as none; the run's own may name a server.
        self.environ = {"DATABASE_URL": url, "O7S_SECRET_KEY": KEY, "MONGODB_URL": ""}

    def invoke(self, line: str, stdin: str = "") -> Result:
        group, *words = line.split()
        return CliRunner().invoke(
            GROUPS[group], words, input=stdin, env=self.environ, catch_exceptions=False
        )

    def type(self, line: str, stdin: str = "") -> str:
        """Return what a command that succeeds prints."""
        result = self.invoke(line, stdin)
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    def read(self, line: str) -> Any:
        return orjson.loads(self.type(f"{line} --json"))

    def refusal(self, line: str, stdin: str = "") -> str:
        """Return the one sentence of a command that is refused."""
        result = self.invoke(line, stdin)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        return result.stderr

    def tenant(self, handle: str) -> Tenant:
        return asyncio.run(self.ask(lambda store: store.fetch_tenant(handle)))

    async def ask(self, question: Callable[[Store], Any]) -> Any:
        control = Control(database_url=Secret(self.url))
        async with Store(control, Vault(Secret(KEY))) as store:
            return await question(store)


@pytest.fixture
def terminal(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("LOGNAME", "ann")
    made = Terminal(postgres.dsn(postgres.create_database()))
    asyncio.run(made.ask(lambda store: store.migrate()))
    return made


def test_an_organisation_is_created_listed_and_shown(terminal: Terminal) -> None:
    assert terminal.type("org create org_a --name Acme --tier pro") == (
        "org_a created in tier pro\n"
    )
    terminal.type("org create org_b")
    listed = terminal.read("org list")
    assert [(org["handle"], org["name"], org["tier"]) for org in listed] == [
        ("org_a", "Acme", "pro"),
        ("org_b", "org_b", "free"),
    ]
    table = terminal.type("org list")
    assert "Acme" in table and "connections override" in table
    terminal.type("key create org_a --name ci")
    shown = terminal.type("org show org_a")
    assert "Acme" in shown and "ogk_" in shown and "none" in shown
    assert set(terminal.read("org show org_a")) == {"organization", "keys", "databases"}


def test_what_an_operator_sets_is_what_the_proxy_reads(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    assert terminal.read("org set-tier org_a pro")["tier"] == "pro"
    terminal.type("org suspend org_a")
    terminal.type("org set-limiter org_a warn --max-wait 1.5")
    terminal.type("org set-connections org_a 7")
    tenant = terminal.tenant("org_a")
    assert tenant.is_suspended
    assert (tenant.limiter_mode, tenant.max_wait) == ("warn", 1.5)
    assert tenant.max_connections == 7
    assert "in 24.0 h" in terminal.refusal("org set-tier org_a free")
    terminal.type("org set-tier org_a free --force")
    terminal.type("org resume org_a")
    assert "as its tier" in terminal.type("org set-connections org_a")
    tenant = terminal.tenant("org_a")
    assert not tenant.is_suspended
    assert tenant.max_connections == 5


def test_a_new_key_is_shown_once_and_verifies(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    secret = terminal.type("key create org_a --name ci").splitlines()[0]
    assert apikey.is_well_formed(secret)
    tenant = terminal.tenant("org_a")
    (key,) = tenant.keys
    assert make_verifier(secret, tenant.salt, tenant.iterations) == (
        key.stored_key,
        key.server_key,
    )
    listed = terminal.type("key list org_a")
    assert secret not in listed and apikey.prefix(secret) in listed
    terminal.type(f"key revoke org_a {key.id}")
    assert terminal.tenant("org_a").keys == ()
    assert "no live key" in terminal.refusal(f"key revoke org_a {key.id}")
    assert terminal.read("key list org_a")[0]["revoked_at"] is not None


def test_a_key_as_json_holds_its_secret(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    made = terminal.read("key create org_a")
    assert apikey.is_well_formed(made["secret"])
    assert made["name"] == "default"


def test_operators_keys_are_made_listed_and_revoked(terminal: Terminal) -> None:
    assert terminal.type("operator-key list") == "none\n"
    assert terminal.tenant(OPERATORS) is None
    secret = terminal.type("operator-key create --name alice").splitlines()[0]
    made = terminal.read("operator-key create")
    operators = terminal.tenant(OPERATORS)
    assert [key.name for key in operators.keys] == ["alice", "default"]
    verifier = make_verifier(secret, operators.salt, operators.iterations)
    assert (operators.keys[0].stored_key, operators.keys[0].server_key) == verifier
    shown = terminal.type("operator-key list")
    assert apikey.prefix(secret) in shown
    assert secret not in shown
    terminal.type(f"operator-key revoke {made['id']}")
    after = terminal.tenant(OPERATORS)
    assert [key.name for key in after.keys] == ["alice"]
    assert after.version > operators.version
    refusal = terminal.refusal(f"operator-key revoke {made['id']}")
    assert "no live operator key" in refusal
    assert [row["name"] for row in terminal.read("org list")] == []
    assert "is no handle" in terminal.refusal(f"org create {OPERATORS}")


def test_a_connection_string_comes_by_standard_input(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    line = "db create org_a app --type postgres --pool-mode session --dsn -"
    terminal.type(line, stdin=f"{DSN}\n")
    target = terminal.tenant("org_a").databases["app"]
    assert (target.dsn, target.pool_mode) == (Secret(DSN), "session")
    assert "hunter22" not in terminal.type("db list org_a")
    assert "1 of the 1" in terminal.refusal("db create org_a b --dsn -", stdin=DSN)
    terminal.environ["O7S_TARGET_DSN"] = "postgresql://role:next@10.0.0.1/db"
    terminal.type("db set-dsn org_a app")
    target = terminal.tenant("org_a").databases["app"]
    assert target.dsn.get_secret_value().startswith("postgresql://role:next@")
    terminal.type("db drop org_a app")
    assert terminal.tenant("org_a").databases == {}


def test_a_refusal_does_not_repeat_the_connection_string(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    refusal = terminal.refusal("db create org_a app --type redis --dsn -", stdin=DSN)
    assert "starts with redis://" in refusal
    assert "hunter22" not in refusal


def test_keys_are_rotated_by_reencrypting(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    terminal.type("db create org_a app --dsn -", stdin=DSN)
    fresh = Fernet.generate_key().decode()
    terminal.environ["O7S_SECRET_KEY"] = f"{fresh},{KEY}"
    assert terminal.type("db reencrypt") == "1 connection strings re-encrypted\n"
    terminal.environ["O7S_SECRET_KEY"] = KEY
    assert "no key decrypts: org_a/app" in terminal.refusal("db reencrypt")


def test_a_tiers_limit_is_set_for_all_its_organisations(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    terminal.type("tier set free max_connections 6")
    terminal.type("tier set free max_databases none")
    terminal.type("tier set free max_in_flight none")
    terminal.type("tier set free weight 7")
    tier = terminal.tenant("org_a").tier
    assert (tier.max_connections, tier.max_databases) == (6, None)
    assert (tier.max_in_flight, tier.weight) == (None, 7)
    assert "invalid input" in terminal.refusal("tier set free max_connections many")
    assert [row["name"] for row in terminal.read("tier list")] == [
        "free",
        "starter",
        "pro",
        "enterprise",
    ]
    assert "community support" in terminal.type("tier list")


def test_usage_is_shown_by_day(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    now = datetime.datetime.now(datetime.UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    with psycopg.connect(terminal.url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO platform.usage_metrics "
            "SELECT id, 'postgres', 0.5, 0.25, 10, 20, 30, 1, %s, %s "
            "FROM platform.organizations",
            (hour, hour + datetime.timedelta(hours=1)),
        )
    (row,) = terminal.read("usage show org_a")
    assert (row["day"], row["query_count"]) == (hour.date().isoformat(), 10)
    assert terminal.read(f"usage show --since {hour:%Y-%m-%d}") == [row]
    assert terminal.read("usage show --until 2020-01-01 --since 2020-01-01") == []
    assert "postgres" in terminal.type("usage show")
    assert "does not exist" in terminal.refusal("usage show org_nobody")


PAYER = Payer(UUID(int=0), "org_a", "pro", "postgres", "app", "psql")
SPENT = Row(
    slot=4,
    payer=PAYER,
    fingerprint=(1 << 64) - 5,
    queries=3,
    refused=1,
    errors=0,
    sqlstate="",
    rows=20,
    bytes_in=100,
    bytes_out=1000,
    server_seconds=1.5,
    queue_seconds=0.25,
    throttled_seconds=0.125,
    vcpu_seconds=7200.0,
    memory_gib_seconds=1800.0,
    longest_seconds=1.0,
    first_at=time.time(),
    last_at=time.time(),
)


@pytest.mark.parametrize("place", ["postgres", "mongodb"])
def test_history_is_shown_by_statement_wherever_it_is(
    terminal: Terminal, place: str, request: pytest.FixtureRequest
) -> None:
    terminal.type("org create org_a")
    org_id = terminal.tenant("org_a").id
    mine = replace(SPENT, payer=replace(PAYER, org_id=org_id))
    rows = (
        mine,
        replace(mine, slot=5, longest_seconds=9.0),
        replace(mine, slot=6, fingerprint=0, server_seconds=1.0),
        replace(mine, slot=7, payer=replace(PAYER, handle="org_b")),
        replace(mine, slot=8, first_at=1.0),
    )
    batch = Batch(uuid4(), 1, time.time(), rows)
    mongodb: Mongo | None = None
    if place == "mongodb":
        mongodb = request.getfixturevalue("mongodb")
        terminal.environ["MONGODB_URL"] = mongodb.url

    async def deliver() -> None:
        async with Store(Control(database_url=Secret(terminal.url)), None) as store:
            await PostgresSink(store.pool, 30, keeps_history=mongodb is None).deliver(
                batch
            )
        if mongodb is not None:
            sink = MongoSink(Secret(mongodb.url), 30)
            await sink.deliver(batch)
            sink.close()

    asyncio.run(deliver())
    first, second = terminal.read("usage history org_a")
    moment = datetime.datetime.fromisoformat(first.pop("last_at"))
    assert abs(moment.timestamp() - mine.last_at) < 0.002
    assert first == {
        "handle": "org_a",
        "database": "app",
        "database_type": "postgres",
        "application_name": "psql",
        "fingerprint": "fffffffffffffffb",
        "queries": 6,
        "refused": 2,
        "errors": 0,
        "rows": 40,
        "bytes_in": 200,
        "bytes_out": 2000,
        "server_seconds": 3.0,
        "longest_seconds": 9.0,
        "vcpu_hours": 4.0,
        "memory_gb_hours": 1.0,
    }
    assert (second["fingerprint"], second["server_seconds"]) == (None, 1.0)
    assert len(terminal.read("usage history")) == 3
    assert len(terminal.read("usage history --limit 1")) == 1
    assert len(terminal.read("usage history org_a --since 1970-01-01")) == 2
    assert terminal.read("usage history --until 1970-01-02 --since 1970-01-02") == []
    assert "fffffffffffffffb" in terminal.type("usage history")
    assert "does not exist" in terminal.refusal("usage history org_nobody")


def test_a_mongodb_that_is_away_is_one_sentence(terminal: Terminal) -> None:
    url = "mongodb://u:hunter22@127.0.0.1:1/x"
    refusal = terminal.refusal(f"usage history --mongodb-url {url}")
    assert "MongoDB gives no answer" in refusal and "hunter22" not in refusal


def test_the_audit_names_the_operator(terminal: Terminal) -> None:
    terminal.type("org create org_a")
    with psycopg.connect(terminal.url) as connection:
        rows = connection.execute("SELECT actor FROM platform.events").fetchall()
    assert rows == [("cli:ann",)]


def test_a_name_is_not_read_as_markup(terminal: Terminal) -> None:
    terminal.type("org create org_a --name [red]x[/red]")
    assert "[red]x[/red]" in terminal.type("org list")


def test_a_dev_stack_is_named_by_its_state_directory(
    terminal: Terminal, tmp_path: Path
) -> None:
    terminal.environ = {"DATABASE_URL": "", "O7S_SECRET_KEY": ""}
    assert "which control plane?" in terminal.refusal("org list")
    assert "no dev stack there" in terminal.refusal(f"org list --state {tmp_path}/x")
    secrets = tmp_path / "secrets.json"
    secrets.write_bytes(orjson.dumps({"database_url": "hunter22"}))
    refusal = terminal.refusal(f"org list --state {tmp_path}")
    assert "is not a dev stack's" in refusal and "hunter22" not in refusal
    secrets.write_bytes(orjson.dumps({"database_url": terminal.url, "secret_key": KEY}))
    assert terminal.type(f"org list --state {tmp_path}") == "none\n"


def test_a_control_plane_that_is_away_is_one_sentence(terminal: Terminal) -> None:
    away = "org list --database-url postgresql://u:hunter22@127.0.0.1:1/x"
    refusal = terminal.refusal(away)
    assert "gives no answer" in refusal and "hunter22" not in refusal
    del terminal.environ["O7S_SECRET_KEY"]
    terminal.type("org create org_a")
    refusal = terminal.refusal("db create org_a app --dsn -", stdin=DSN)
    assert "O7S_SECRET_KEY" in refusal
