"""The command line: what it prints, refuses and does with signals."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ogelproxy.cli import main, raise_file_limit
from ogelproxy.settings import manual, sample

#: Cancelled by the first signal, it then drains for ever.
SLOW_DRAIN = """
import asyncio
from ogelproxy.cli import until_asked_to_stop
async def run():
    with until_asked_to_stop():
        print("ready", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("draining", flush=True)
            {drain}
    print("stopped", flush=True)
asyncio.run(run())
"""


def run(*arguments: str, **environ: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, env=environ)
    return result.exit_code, result.output


def started(drain: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DRAIN.format(drain=drain)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_config_prints_the_sample_and_with_markdown_the_page() -> None:
    assert run("config") == (0, sample())
    assert run("config", "--markdown") == (0, manual())


def test_the_module_is_the_command() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "ogelproxy", "config"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == sample()


def test_a_wrong_setting_is_a_sentence_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "ogelproxy.toml"
    path.write_text("[pool]\nmax_servers = 0\n")
    code, output = run("serve", "--config", str(path))
    assert code == 1
    assert output.startswith("Error: pool.max_servers: ")
    assert len(output.splitlines()) == 1


def test_an_unknown_name_in_the_environment_is_refused() -> None:
    code, output = run("serve", OGELPROXY_POOL_MAXSERVERS="3")
    assert code == 1
    assert output == "Error: OGELPROXY_POOL_MAXSERVERS: no such setting\n"


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, output = run("dev", "--state", str(tmp_path / "file" / "state"))
    assert code == 1
    assert output.startswith(f"Error: --state {tmp_path}/file/state: ")


def test_serving_with_workers_needs_a_place_to_meet() -> None:
    code, output = run("serve", "--workers", "2")
    assert code == 1
    assert output == "Error: redis.url (REDIS_URL) is needed for 2 workers\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_ends_well(number: signal.Signals) -> None:
    with started("await asyncio.sleep(0)") as process:
        process.send_signal(number)
        output, _ = process.communicate()
    assert output == "draining\nstopped\n"
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_a_drain_at_once(number: signal.Signals) -> None:
    with started("await asyncio.Event().wait()") as process:
        assert process.stdout is not None
        process.send_signal(number)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(number)
    assert process.returncode == -number


def test_the_file_limit_is_raised_as_far_as_it_goes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
