"""This machine: descriptors, ports, and what the kernel is set to."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ogelproxy.child import is_free
from ogelproxy.config import Config, Listen
from ogelproxy.doctor.finding import Finding, fail, ok, warn

#: Descriptors beside those of clients and of one server for each of them: files,
#: the control plane, Redis.
SPARE_DESCRIPTORS = 200
#: Clock sources that are read without entering the kernel (vdso(7)).
FAST_CLOCKS = frozenset(
    {"tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"}
)
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
CLOCK = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
LISTENING = "0A"  # TCP_LISTEN, as /proc/net/tcp writes it (proc(5))
OURS = "ogelproxy"
#: Interpreter, one of its options, -m, the module.
COMMAND_WORDS = 4


def examine(config: Config) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield descriptors(config.listen, hard)
    listen, admin = config.listen, config.admin
    yield port("listen.port", listen.host, listen.port)
    if admin.port is not None:
        yield port("admin.port", admin.host, admin.port)
    if (maximum := _read(SOMAXCONN)) is not None:
        yield accept_queue(listen, int(maximum))
    if (name := _read(CLOCK)) is not None:
        yield clock_source(name)


def descriptors(listen: Listen, hard: int) -> Finding:
    """Compare the hard limit, which a start raises the soft one to."""
    subject = "file descriptors"
    advice = "raise the hard limit of open files: ulimit -Hn, systemd's LimitNOFILE"
    if hard == resource.RLIM_INFINITY:
        return ok(subject, "no limit")
    text = f"at most {hard:,} here; listen.max_clients is {listen.max_clients:,}"
    if hard < listen.max_logins + SPARE_DESCRIPTORS:
        return fail(subject, f"{text}, listen.max_logins {listen.max_logins:,}", advice)
    if hard < 2 * listen.max_clients + SPARE_DESCRIPTORS:
        # When they run out, accepting pauses until somebody leaves.
        return warn(subject, f"{text}, and each may need a server", advice)
    return ok(subject, text)


def port(setting: str, host: str, number: int) -> Finding:
    """See that the port is free, or that a proxy of ours listens there."""
    where = f"{host} port {number}"
    if number == 0:
        return ok(setting, "any that is free")
    try:
        if is_free(number, host):
            return ok(setting, f"{where} is free")
    except PermissionError:
        return fail(
            setting,
            f"{where}: not without rights",
            "take a port from 1024 up, or grant CAP_NET_BIND_SERVICE",
        )
    except OSError as error:
        return fail(
            setting,
            f"{where}: {error.strerror}",
            f"correct {setting.partition('.')[0]}.host",
        )
    commands = dict(_listeners(number))
    if any(_is_ours(command) for command in commands.values()):
        return ok(setting, f"{where} is in use by a running ogelproxy")
    named = ", ".join(
        f"{command[0]} (process {pid})" for pid, command in commands.items()
    )
    return fail(
        setting,
        f"{where} is in use by {named or 'a process of another user'}",
        f"end it or choose another {setting}",
    )


def accept_queue(listen: Listen, maximum: int) -> Finding:
    subject = "accept queue"
    text = f"net.core.somaxconn is {maximum}, listen.backlog {listen.backlog}"
    if maximum >= listen.backlog:
        return ok(subject, text)
    return warn(
        subject,
        f"{text}: bursts of connections beyond the former are dropped",
        f"sysctl net.core.somaxconn={listen.backlog}",
    )


def clock_source(name: str) -> Finding:
    subject = "clock source"
    if name in FAST_CLOCKS:
        return ok(subject, name)
    return warn(
        subject,
        f"{name}: each look at the clock enters the kernel",
        "boot with clocksource=tsc where the machine has a stable one",
    )


def _is_ours(command: list[str]) -> bool:
    """Say whether it is `ogelproxy …` or `python -m ogelproxy …`."""
    return OURS in (Path(word).name for word in command[:COMMAND_WORDS])


def _listeners(number: int) -> Iterator[tuple[int, list[str]]]:
    """Yield pid and command line of those that listen there, as far as we may see."""
    inodes = {
        f"socket:[{fields[9]}]"
        for name in ("tcp", "tcp6")
        for line in (_read(Path("/proc/net") / name) or "").splitlines()[1:]
        if (fields := line.split())[3] == LISTENING
        and int(fields[1].rpartition(":")[2], 16) == number
    }
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile, close what we look at, or be another user's.
        with contextlib.suppress(OSError):
            if any(_link(each) in inodes for each in (process / "fd").iterdir()):
                line = (process / "cmdline").read_bytes().decode(errors="replace")
                yield int(process.name), line.split("\0")


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None  # another system than Linux
