"""Redis or Valkey: whether it is a fit meeting point of workers and machines."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ogelproxy.config import Config, Limits
from ogelproxy.config import Redis as RedisConfig
from ogelproxy.doctor.finding import Finding, Now, compare_clock, fail, ok, warn
from ogelproxy.errors import ConfigInvalid, RedisUnavailable
from ogelproxy.hosts import count_hosts
from ogelproxy.redis import Redis

SERVER = "redis"
#: The oldest that the tests were run on, where `OGELPROXY_VALKEY_BIN` named it.
MIN_VERSION = (6, 2)
#: Share of maxmemory in use from which the end is near: then writes are refused.
NEARLY_FULL = 0.8
#: Answered even when a failing snapshot has PING refused.
QUESTION = ("ECHO", "ogelproxy doctor")
TRIES = 21
#: Seconds of a round trip from which a tenant's first query is felt to wait.
SLOW = 0.005
#: Leases last about two seconds: an old master must stop before they are granted
#: a second time by a new one.
MAX_LAG = 2

Info = Mapping[str, Any]


async def examine(config: Config, now: Now) -> AsyncIterator[Finding]:
    """Look at Redis, as far as it can be reached."""
    if config.redis.url is None:
        yield absent(config.workers)
        return
    try:
        redis = Redis(config.redis)
    except ConfigInvalid as error:
        yield fail(SERVER, str(error), "correct redis.url (REDIS_URL)")
        return
    try:
        try:
            await redis.command(*QUESTION)
        except RedisUnavailable as error:
            yield fail(
                SERVER,
                str(error),
                "see that it runs, takes connections from here, and that redis.url "
                "(REDIS_URL) has its password",
            )
            return
        async for finding in _examine(redis, config, now):
            yield finding
    finally:
        await redis.stop()


def absent(workers: int) -> Finding:
    if workers == 1:
        return ok(SERVER, "not set: one process counts for itself")
    return fail(
        SERVER,
        f"not set, and {workers} workers need it to count together",
        "set redis.url (REDIS_URL)",
    )


async def _examine(redis: Redis, config: Config, now: Now) -> AsyncIterator[Finding]:
    try:
        yield round_trip([await _ask(redis) for _ in range(TRIES)], config.redis)
        info: Info = await redis.command("INFO")
        yield version(info)
        yield role(info)
        yield eviction(info)
        yield memory(info)
        yield persistence(info)
        if info["connected_slaves"]:
            yield await replicas(redis, info)
        yield await scripts(redis)
        yield hosts(await count_hosts(redis), config.limits)
        yield await compare_clock(f"{SERVER} clock", lambda: _time(redis), now)
    except RedisUnavailable as error:
        yield fail(SERVER, str(error), "let the user of redis.url run this command")


async def _ask(redis: Redis) -> float:
    begun = time.perf_counter()
    await redis.command(*QUESTION)
    return time.perf_counter() - begun


async def _time(redis: Redis) -> float:
    seconds, microseconds = await redis.command("TIME")
    return int(seconds) + int(microseconds) / 1e6


def round_trip(times: Sequence[float], config: RedisConfig) -> Finding:
    """Judge seconds from question to answer, the worst against the time limit."""
    subject = f"{SERVER} round trip"
    usual, worst = statistics.median(times), max(times)
    text = f"{usual * 1000:.2f} ms, at most {worst * 1000:.2f} ms"
    if worst > config.timeout / 2:
        return fail(
            subject,
            f"{text}; redis.timeout is {config.timeout:g} s",
            "bring Redis closer or raise redis.timeout",
        )
    if usual > SLOW:
        return warn(subject, text, "bring Redis closer: the same region and zone")
    return ok(subject, text)


def version(info: Info) -> Finding:
    """Valkey names the Redis that it is compatible with, too."""
    subject = f"{SERVER} version"
    compatible = str(info["redis_version"])
    text = f"Redis {compatible}"
    if "valkey_version" in info:
        text = f"Valkey {info['valkey_version']}"
    numbers = tuple(int(part) for part in compatible.split(".")[:2])
    if numbers >= MIN_VERSION:
        return ok(subject, text)
    wanted = ".".join(map(str, MIN_VERSION))
    return fail(subject, text, f"upgrade to Valkey, or Redis {wanted} or newer")


def role(info: Info) -> Finding:
    subject = f"{SERVER} role"
    if info.get("cluster_enabled"):
        return fail(
            subject,
            "a cluster, whose keys lie on several servers",
            "name a single server, or a primary with replicas, in redis.url",
        )
    if info["role"] != "master":
        return fail(
            subject,
            "a replica, which takes no writes",
            f"name its primary in redis.url: {info.get('master_host', 'unknown')}",
        )
    return ok(subject, f"primary with {info['connected_slaves']} replicas")


def eviction(info: Info) -> Finding:
    """A lease that is evicted is granted again: a limit is broken then."""
    subject = f"{SERVER} eviction"
    policy = str(info["maxmemory_policy"])
    if policy == "noeviction":
        return ok(subject, policy)
    advice = "CONFIG SET maxmemory-policy noeviction, and in its configuration"
    if not info["maxmemory"]:
        return warn(subject, f"{policy}, once maxmemory is set", advice)
    return fail(subject, f"{policy}: leases may be forgotten", advice)


def memory(info: Info) -> Finding:
    subject = f"{SERVER} memory"
    used, limit = int(info["used_memory"]), int(info["maxmemory"])
    mebibyte = 1024 * 1024
    if not limit:
        return ok(subject, f"{used / mebibyte:,.1f} MiB, maxmemory is not set")
    text = f"{used / mebibyte:,.1f} of {limit / mebibyte:,.1f} MiB"
    if used < NEARLY_FULL * limit:
        return ok(subject, text)
    return warn(subject, text, "raise maxmemory: when it is reached writes are refused")


def persistence(info: Info) -> Finding:
    """Nothing here has to be kept, but a failing snapshot stops all writes."""
    subject = f"{SERVER} persistence"
    failing = [
        name
        for name in ("rdb_last_bgsave_status", "aof_last_write_status")
        if info.get(name, "ok") != "ok"
    ]
    if failing:
        return fail(
            subject,
            f"{', '.join(failing)}: writes are refused while it fails",
            "give it disk space, or CONFIG SET save '' and appendonly no: ogelproxy "
            "needs neither",
        )
    if info.get("aof_enabled"):
        return ok(subject, "append-only file; ogelproxy needs none")
    return ok(subject, "nothing that ogelproxy keeps there has to last")


async def replicas(redis: Redis, info: Info) -> Finding:
    """Two masters, for a while, would both grant the same tokens."""
    subject = f"{SERVER} fail-over"
    known = await redis.command("CONFIG GET", "min-*-*")
    settings = {_word(name): int(_word(value)) for name, value in known.items()}
    least, lag = (
        settings.get(f"min-replicas-{name}", 0) for name in ("to-write", "max-lag")
    )
    text = f"min-replicas-to-write {least}, min-replicas-max-lag {lag}"
    if least and 0 < lag <= MAX_LAG:
        return ok(subject, text)
    return warn(
        subject,
        f"{text}: an old primary may go on granting beside a new one",
        f"CONFIG SET min-replicas-to-write 1 and min-replicas-max-lag {MAX_LAG}; "
        "Sentinel's down-after-milliseconds above 4000",
    )


async def scripts(redis: Redis) -> Finding:
    subject = f"{SERVER} scripts"
    try:
        await redis.command("EVAL", "return redis.call('TIME')[1]", 0)
    except RedisUnavailable as error:
        return fail(
            subject,
            str(error),
            "let the user of redis.url run EVAL, EVALSHA, SCRIPT and TIME",
        )
    return ok(subject, "run")


def hosts(count: int, limits: Limits) -> Finding:
    """See that every process has its part of what needs no Redis."""
    subject = f"{SERVER} hosts"
    text = f"{count} processes have a number, limits.max_hosts is {limits.max_hosts}"
    if count < limits.max_hosts or not limits.floor:
        return ok(subject, text)
    return warn(
        subject,
        f"{text}: further ones refuse all queries while Redis is away",
        "raise limits.max_hosts on all machines; numbers of processes that were killed "
        "are free again after 11 minutes",
    )


def _word(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
