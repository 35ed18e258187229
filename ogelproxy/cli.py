"""The command line: arguments, logging, signals, the event loop.

The only file that touches the process. `serve` runs an Engine from settings,
`dev` one on an embedded stack, `doctor` looks at what they need, `config` prints the
settings; the operators' commands come from `operate`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import click
import orjson
import uvloop
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ogelproxy import doctor, operate, settings
from ogelproxy.config import MAX_WORKERS, Config
from ogelproxy.dev import LOG, DevOptions, DevStack, kept_config
from ogelproxy.engine import Engine
from ogelproxy.errors import OgelError
from ogelproxy.logs import configure
from ogelproxy.supervisor import Supervisor
from ogelproxy.worker import Worker

logger = logging.getLogger("ogelproxy.cli")

#: The last of the descriptors that every process is to have.
STDERR = 2

VERDICT_STYLES = {
    doctor.Verdict.OK: "green",
    doctor.Verdict.WARN: "yellow",
    doctor.Verdict.FAIL: "red",
}


class Commands(click.Group):
    """A group whose commands end with a sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (OgelError, OSError) as error:  # such as a port that is taken
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ogelproxy")
def main() -> None:
    """Run and operate ogelproxy, a multi-tenant Postgres proxy."""
    _fill_standard_streams()


def _fill_standard_streams() -> None:
    """Open what of descriptors 0 to 2 we were started without.

    The first sockets would get these numbers, and libuv aborts when it closes one.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)


for group in (
    operate.org,
    operate.key,
    operate.operator_key,
    operate.db,
    operate.tier,
    operate.usage,
):
    main.add_command(group)


config_option = click.option(
    "--config",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with settings; the environment goes before it.",
)


@main.command()
@config_option
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    help="Processes that share the port; goes before the setting.",
)
def serve(path: Path | None, workers: int | None) -> None:
    """Run the proxy in production.

    SIGTERM and SIGINT finish open transactions and end; a second one ends at
    once. SIGHUP reads settings and certificates again, SIGUSR1 replaces the
    workers one after the other.
    """
    reread = functools.partial(load, path, workers)
    config = reread()
    configure(config.log)
    raise_file_limit()
    uvloop.run(_serve(config, reread))


def load(path: Path | None, workers: int | None) -> Config:
    """Read the settings. Raises ConfigInvalid."""
    config = Config.load(path, os.environ)
    if workers is None:
        return config
    return config.model_copy(update={"workers": workers})


async def _serve(config: Config, reread: Callable[[], Config]) -> None:
    is_alone = config.workers == 1
    with until_asked_to_stop():
        proxy: Engine | Supervisor
        proxy = (Engine if is_alone else Supervisor)(config, reread=reread)
        async with proxy:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, reload, proxy, reread)
            loop.add_signal_handler(signal.SIGUSR1, roll, proxy)
            logger.info("ready", extra=_addresses(proxy))
            try:
                await proxy.stop_asked.wait()
            finally:
                logger.info("draining", extra={"timeout": config.drain_timeout})
                await proxy.drain()
    logger.info("stopped")


def reload(proxy: Engine | Supervisor, reread: Callable[[], Config]) -> None:
    """Apply the settings as they are now; where they are wrong the old ones stay."""
    try:
        proxy.reload(reread())
    except (OgelError, OSError) as error:
        logger.error("not reloaded: %s", error)
    else:
        logger.info("reloaded")


def roll(proxy: Engine | Supervisor | None) -> None:
    """Replace the workers, if there are any."""
    if isinstance(proxy, Supervisor):
        proxy.roll()
    else:
        logger.error("not rolled: a single process has no workers")


@main.command(hidden=True)
@click.argument("place", type=int)
@click.argument("listening", type=int)
@click.argument("line", type=int)
def worker(place: int, listening: int, line: int) -> None:
    """Be one worker of `serve` or `dev`, with the descriptors that it gave."""
    # These are the supervisor's to hear; SIGTERM drains this worker alone.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in (listening, line):
        os.set_inheritable(descriptor, False)
    uvloop.run(_work(place, listening, line))


async def _work(place: int, listening: int, line: int) -> None:
    with until_asked_to_stop(signal.SIGTERM):
        inside = Worker(
            socket.socket(fileno=line), socket.socket(fileno=listening), place
        )
        config = await inside.enlist()
        configure(config.log, worker=place)
        if not await inside.run(config):
            raise SystemExit(1)


def _addresses(engine: Engine | Supervisor) -> dict[str, str]:
    return {
        name: f"{address[0]}:{address[1]}"
        for name, address in engine.addresses.items()
        if address is not None
    }


@main.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5432,
    show_default=True,
    help="Where clients connect; 0 picks a free port.",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Health and metrics over HTTP; 0 picks a free port.",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".state"),
    show_default=True,
    help="Directory of everything that is kept.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=1,
    show_default=True,
    help="Processes that share the port.",
)
@click.option("--tls", "has_tls", is_flag=True, help="Offer a self-signed certificate.")
def dev(port: int, admin_port: int, state: Path, workers: int, has_tls: bool) -> None:
    """Run the proxy with a Postgres, a Valkey and demo organisations of its own."""
    configure(LOG)
    raise_file_limit()
    uvloop.run(_dev(DevOptions(state, port, admin_port, has_tls, workers)))


async def _dev(options: DevOptions) -> None:
    console = Console(highlight=False)
    with until_asked_to_stop():
        progress = Progress(console)
        with progress:
            stack = DevStack(options, progress.step)
            await stack.start()
        try:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, roll, stack.proxy)
            show(console, stack)
            await stack.wait_ended()
        finally:
            console.print("Stopping")
            await stack.stop()


class Progress:
    """The steps of a start: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._step = ""  # the one that runs
        self._since = 0.0  # when it began, monotonic seconds

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._status.stop()

    def step(self, text: str) -> None:
        """Finish the step before and begin this one."""
        self._finish()
        self._step, self._since = text, time.monotonic()
        self._status.update(text)

    def _finish(self) -> None:
        if self._step:
            seconds = time.monotonic() - self._since
            self._console.print(f"{self._step}: {seconds:.2f} s")


def show(console: Console, stack: DevStack) -> None:
    """Print what a person pastes next."""
    console.print()
    for each in stack.databases:
        # Whole lines: a URL that was wrapped or cut can't be pasted.
        line = f"{each.tier:<11} {each.pool_mode:<12} {each.url}"
        console.print(line, soft_wrap=True, markup=False)
    line = f"operators' console: {stack.console_url}"
    console.print(line, soft_wrap=True, markup=False)
    console.print()
    if stack.admin_url is not None:
        console.print(f"Health and metrics: {stack.admin_url}/health and /metrics")
    console.print("Ready. Ctrl-C stops it.")


@main.command("doctor")
@config_option
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="State directory of a running dev stack, instead of settings.",
)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor_command(
    ctx: click.Context, path: Path | None, state: Path | None, is_json: bool
) -> None:
    """Look at all that the proxy needs and say what to do.

    Changes nothing. Ends with status 1 when something has failed.
    """
    if path is not None and state is not None:
        raise click.UsageError("--config and --state are one too many")
    config = Config.load(path, os.environ) if state is None else kept_config(state)
    # What is found is told once, by the findings.
    logging.getLogger("ogelproxy").addHandler(logging.NullHandler())
    findings = asyncio.run(doctor.examine(config))
    if is_json:
        click.echo(orjson.dumps(findings, option=orjson.OPT_INDENT_2))
    else:
        show_findings(findings)
    if any(each.verdict is doctor.Verdict.FAIL for each in findings):
        ctx.exit(1)


def show_findings(findings: Sequence[doctor.Finding]) -> None:
    """Print a line per finding, and its advice below it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("", "what", "found"):
        table.add_column(title, overflow="fold")
    for each in findings:
        found = Text(each.text)
        if each.advice:
            found.append(f"\n→ {each.advice}", style="bold")
        style = VERDICT_STYLES[each.verdict]
        table.add_row(Text(each.verdict, style=style), Text(each.subject), found)
    Console(width=None if sys.stdout.isatty() else operate.PIPED_COLUMNS).print(table)


@main.command("config")
@click.option("--markdown", is_flag=True, help="The reference page instead.")
def config_command(markdown: bool) -> None:
    """Print every setting as a commented sample file."""
    click.echo(settings.manual() if markdown else settings.sample(), nl=False)


@contextmanager
def until_asked_to_stop(
    *numbers: signal.Signals,
) -> Iterator[None]:
    """Leave the block at the first of these signals; SIGTERM and SIGINT by default.

    The block is cancelled, so it can drain on its way out; a second signal,
    whenever it comes, ends the process at once.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    is_asked = False

    def ask(number: int) -> None:
        nonlocal is_asked
        if is_asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        is_asked = True
        task.cancel()

    for number in numbers or (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    try:
        yield
    except asyncio.CancelledError:
        if not is_asked:
            raise
        task.uncancel()


def raise_file_limit() -> None:
    """Allow as many open files, thus connections, as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS names a hard limit that it does not grant.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
