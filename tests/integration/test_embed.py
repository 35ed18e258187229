"""The engine inside of somebody else's program and event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import secrets
import struct
import textwrap
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import uvloop

from ogelproxy import (
    Config,
    DatabaseType,
    Engine,
    InMemoryDirectory,
    KeyVerifier,
    MemorySink,
    PoolMode,
    Secret,
    Target,
    Tenant,
    Tier,
)
from ogelproxy.auth import apikey
from ogelproxy.auth.scram import make_verifier
from ogelproxy.config import Admin, Listen, Usage
from ogelproxy.tenants.model import OPERATORS
from tests.fixtures.postgres import Postgres

README = Path(__file__).parent.parent.parent / "README.md"
SALT = b"sixteen bytes..."
KEY = apikey.generate()

TIER = Tier(
    name="pro",
    max_connections=50,
    max_queries_per_second=1000,
    max_storage_gb=1,
    may_burst=True,
    monthly_fee=0,
    included_vcpu_hours=0,
    included_memory_gb_hours=0,
    overage_vcpu_hour=None,
    overage_gb_hour=None,
    max_databases=None,
)

Work = Callable[[], Coroutine[Any, Any, None]]


def settings(directory: Path) -> Config:
    return Config(
        listen=Listen(port=0), admin=Admin(port=0), usage=Usage(spool_dir=directory)
    )


def tenant(postgres: Postgres, handle: str = "org_embedded") -> Tenant:
    target = Target(
        uuid4(), "app", DatabaseType.POSTGRES, PoolMode.AUTO, Secret(postgres.dsn())
    )
    return Tenant(
        id=uuid4(),
        handle=handle,
        name="Embedded",
        tier=TIER,
        is_suspended=False,
        version=1,
        salt=SALT,
        keys=(KeyVerifier(uuid4(), "first", *make_verifier(KEY, SALT, 4096)),),
        databases={"app": target},
    )


async def connect(
    engine: Engine, handle: str = "org_embedded", database: str = "app"
) -> asyncpg.Connection:
    address = engine.addresses["postgres"]
    assert address is not None
    host, port = address
    return await asyncpg.connect(
        host=host, port=port, user=handle, password=KEY, database=database, timeout=10
    )


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop])
def run(request: pytest.FixtureRequest) -> Callable[[Work], None]:
    """Run a coroutine function in a fresh loop of either kind."""

    def run(work: Work) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(work())

    return run


def test_a_client_and_the_engine_live_in_one_loop(
    postgres: Postgres, tmp_path: Path, run: Callable[[Work], None]
) -> None:
    sink = MemorySink()
    directory = InMemoryDirectory([tenant(postgres)])

    async def work() -> None:
        config = settings(tmp_path)
        async with Engine(config, directory=directory, sinks=[sink]) as engine:
            connection = await connect(engine)
            for n in range(20):
                assert await connection.fetchval("SELECT $1::int", n) == n
            rows = await connection.fetch("SELECT generate_series(1, 100000)")
            assert len(rows) == 100_000
            assert engine.is_ready
            assert engine.status()["clients"] == 1
            await connection.close()
        assert not engine.is_ready

    run(work)
    assert sum(row.queries for row in sink.rows) == 21
    assert {row.payer.handle for row in sink.rows} == {"org_embedded"}
    assert sum(row.rows for row in sink.rows) == 100_020


def test_two_engines_in_one_loop_never_meet(
    postgres: Postgres, tmp_path: Path, run: Callable[[Work], None]
) -> None:
    sinks = MemorySink(), MemorySink()

    def engine(number: int) -> Engine:
        return Engine(
            settings(tmp_path / str(number)),
            directory=InMemoryDirectory([tenant(postgres, f"org_{number}")]),
            sinks=[sinks[number]],
        )

    async def work() -> None:
        async with engine(0) as first, engine(1) as second:
            assert first.addresses != second.addresses
            one, two = await connect(first, "org_0"), await connect(second, "org_1")
            with pytest.raises(asyncpg.InvalidPasswordError):
                await connect(second, "org_0")
            for _ in range(3):
                await one.execute("SELECT 1")
            await two.execute("SELECT 1")
            counted = b'o7s_requests_total{database_type="postgres",tier="pro"} '
            assert counted + b"3.0" in first.metrics.render()
            assert counted + b"1.0" in second.metrics.render()
            await first.stop()
            assert await two.fetchval("SELECT 2") == 2
            await two.close()

    run(work)
    assert [sum(row.queries for row in sink.rows) for sink in sinks] == [3, 2]


def test_an_embedder_changes_its_records_while_clients_are_connected(
    postgres: Postgres, tmp_path: Path, run: Callable[[Work], None]
) -> None:
    known = tenant(postgres)
    directory = InMemoryDirectory([known])

    async def work() -> None:
        async with Engine(settings(tmp_path), directory=directory) as engine:
            connection = await connect(engine)
            assert await connection.fetchval("SELECT 1") == 1
            directory.remove(known.handle)
            with pytest.raises((asyncpg.PostgresError, ConnectionError)):
                await connection.fetchval("SELECT 2")
            connection.terminate()
            with pytest.raises(asyncpg.InvalidPasswordError):
                await connect(engine)

    run(work)


def test_an_engine_stops_while_a_client_is_logging_in(
    tmp_path: Path, run: Callable[[Work], None]
) -> None:
    async def work() -> None:
        async with Engine(settings(tmp_path), directory=InMemoryDirectory()) as engine:
            address = engine.addresses["postgres"]
            assert address is not None
            reader, writer = await asyncio.open_connection(*address)
            # Its answer shows that the login is under way.
            writer.write(struct.pack(">ii", 8, 80877103))
            assert await reader.read(1) == b"N"
        assert await reader.read() == b""
        writer.close()

    run(work)


def test_an_embedder_s_directory_may_know_operators(
    postgres: Postgres, tmp_path: Path, run: Callable[[Work], None]
) -> None:
    known = tenant(postgres)
    operators = dataclasses.replace(known, handle=OPERATORS, databases={})

    async def work() -> None:
        directory = InMemoryDirectory([known, operators])
        async with Engine(settings(tmp_path), directory=directory) as engine:
            connection = await connect(engine, OPERATORS, OPERATORS)
            assert "ogelproxy" in await connection.fetchval("SHOW VERSION")
            with pytest.raises(asyncpg.ConfigFileError):
                await connection.execute("RELOAD")
            await connection.execute("SHUTDOWN WAIT_FOR_CLIENTS")
            await engine.stop_asked.wait()
            await connection.close()

    run(work)


def test_a_defect_in_an_embedder_s_directory_is_told_with_an_id(
    tmp_path: Path,
    run: Callable[[Work], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(InMemoryDirectory):
        async def find(self, handle: str) -> Tenant | None:
            raise ZeroDivisionError("secret of the operator")

    async def work() -> None:
        async with Engine(settings(tmp_path), directory=Broken()) as engine:
            with pytest.raises(asyncpg.InternalServerError) as caught:
                await connect(engine)
            text = str(caught.value)
            assert "secret" not in text
            assert re.fullmatch(r"internal error [0-9a-f]{8}", text)
            assert text.split()[-1] in caplog.text

    with caplog.at_level(logging.ERROR, "ogelproxy"):
        run(work)


def test_a_port_that_is_taken_leaves_nothing_running(
    postgres: Postgres, tmp_path: Path, run: Callable[[Work], None]
) -> None:
    async def work() -> None:
        directory = InMemoryDirectory([tenant(postgres)])
        async with Engine(settings(tmp_path / "1"), directory=directory) as first:
            address = first.addresses["postgres"]
            assert address is not None
            config = settings(tmp_path / "2")
            listen = config.listen.model_copy(update={"port": address[1]})
            taken = config.model_copy(update={"listen": listen})
            tasks = len(asyncio.all_tasks())
            with pytest.raises(OSError, match="in use"):
                await Engine(taken, directory=directory).start()
            assert len(asyncio.all_tasks()) <= tasks
            # Its spool is free again, and the first engine never noticed.
            async with Engine(config, directory=directory) as second:
                assert await (await connect(second)).fetchval("SELECT 1") == 1
            assert await (await connect(first)).fetchval("SELECT 1") == 1

    run(work)


def test_the_example_of_the_readme_runs(
    postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text().split("## Embed")[1]
    example = section.split("```python")[1].split("```")[0]
    program = f"async def main():\n{textwrap.indent(example, '    ')}"
    config = tmp_path / "ogelproxy.toml"
    config.write_text(
        f"[listen]\nport = 0\n[usage]\nspool_dir = '{tmp_path / 'spool'}'\n"
        f"[control]\nsecret_key = '{secrets.token_urlsafe(24)}'\n"
        f"database_url = '{postgres.dsn(postgres.create_database())}'\n"
    )
    scope: dict[str, Any] = {"path": config, "os": os}
    exec(program, scope)
    asyncio.run(scope["main"]())
    assert re.search(r"\('127\.0\.0\.1', \d+\)", capsys.readouterr().out)
