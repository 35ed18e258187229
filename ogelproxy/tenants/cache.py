"""TenantCache: what the proxies of one control plane tell each other through Redis.

Records by handle for an hour, sealed, with the rule that an older one never takes a
newer one's place; changes, said on a channel by whoever was first to write them; and
what a proxy needs to start. Which of it to believe is `directory`'s business.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import orjson

from ogelproxy import keys
from ogelproxy.errors import RedisUnavailable, SecretUnreadable
from ogelproxy.redis import Call, Redis, Script
from ogelproxy.tenants.memory import is_handle
from ogelproxy.tenants.model import Tenant
from ogelproxy.tenants.seal import Entry, seal, unseal
from ogelproxy.tenants.vault import Vault

logger = logging.getLogger(__name__)

#: Seconds that a record is kept (spec, section 4).
RECORD_TTL = 3600
#: Seconds that a deletion is kept, which no record replaces. Longer than anyone can
#: be late: a record is written within MAX_AGE of being true, and the longest
#: `redis.timeout`.
GONE_TTL = 60
MAX_AGE = 15.0  # seconds
WRITE_RECORDS = 64  # of one pipeline: some 3 ms of the loop's time to encrypt
#: Handles that wait to be written while Redis is away; the oldest goes first.
MAX_UNWRITTEN = 10_000
WRITE_INTERVAL = 0.5  # seconds between tries to write
#: Seconds in which logins don't wait for a Redis that gave no answer, unless
#: somebody else gets one.
READ_INTERVAL = 5.0
#: Digits of the largest version: Postgres's bigint.
MAX_VERSION_DIGITS = 19

#: Called with a handle, its newest version, and whether it was deleted after that.
Heard = Callable[[str, int, bool], None]
#: Answers with a record to write and how many seconds ago it was true, or None.
Known = Callable[[str], tuple[Tenant, float] | None]


@dataclass(frozen=True, slots=True)
class Start:
    """What a proxy reads of the control plane before it knows any tenant."""

    schema: str  # the newest migration that was applied
    mock_secret: bytes


class TenantCache:
    """Redis as the proxies' common memory. Nothing here is a source of truth."""

    def __init__(
        self,
        redis: Redis,
        vault: Vault,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`wall` tells Unix time: machines compare it, to bound how old records get."""
        self._redis = redis
        self._vault = vault
        self._clock = clock
        self._wall = wall
        self._script = Script.read("tenants.lua")
        #: Handles to write, oldest first; of deleted ones the last known version.
        self._unwritten: OrderedDict[str, int | None] = OrderedDict()
        self._is_unwritten = asyncio.Event()  # set while _unwritten holds something
        self._read_again_at = 0.0  # the clock's time; moved by a read that failed

    @property
    def is_worth_asking(self) -> bool:
        """Whether an answer can be expected at once."""
        return self._redis.is_up or self._clock() >= self._read_again_at

    def age(self, entry: Entry) -> float:
        """How many seconds ago it was true, as far as the machines' clocks agree."""
        return max(0.0, self._wall() - entry.known_at)

    def hear(self, heard: Heard, is_heard: Callable[[bool], None]) -> None:
        """Report changes that others wrote; before Redis is started.

        `is_heard` learns when the channel is heard, or not: what was said in
        between is lost.
        """

        def parse(message: bytes) -> None:
            handle, _, rest = message.decode(errors="replace").partition(" ")
            version, _, gone = rest.partition(" ")
            is_number = version.isdecimal() and len(version) <= MAX_VERSION_DIGITS
            if is_handle(handle) and is_number and gone in ("", "gone"):
                heard(handle, int(version), gone == "gone")

        self._redis.hear(keys.CHANGES, parse)
        self._redis.on_heard.append(is_heard)

    async def fetch(self, handles: Collection[str]) -> dict[str, Entry]:
        """Return what can be read of these, by handle. Raises RedisUnavailable."""
        try:
            answers = await self._redis.command("MGET", *map(keys.tier, handles))
        except RedisUnavailable:
            self._read_again_at = self._clock() + READ_INTERVAL
            raise
        entries = {}
        for handle, sealed in zip(handles, answers, strict=True):
            if sealed is not None and (entry := unseal(self._vault, handle, sealed)):
                entries[handle] = entry
        return entries

    def note(self, handle: str, gone: int | None = None) -> None:
        """Write it soon: what is known then, or that `gone` was its last version."""
        self._unwritten.pop(handle, None)
        self._unwritten[handle] = gone
        if len(self._unwritten) > MAX_UNWRITTEN:
            self._unwritten.popitem(last=False)
        self._is_unwritten.set()

    async def write(self, known: Known) -> NoReturn:
        """Write what was noted, until cancelled; again until Redis has taken it."""
        while True:
            await self._is_unwritten.wait()
            batch = dict(itertools.islice(self._unwritten.items(), WRITE_RECORDS))
            for handle in batch:
                del self._unwritten[handle]
            if not self._unwritten:
                self._is_unwritten.clear()
            try:
                if calls := [
                    call
                    for handle, gone in batch.items()
                    if (call := self._call(handle, gone, known))
                ]:
                    await self._redis.run(self._script, calls)
            except RedisUnavailable:
                for handle, gone in batch.items():
                    # What was noted since is newer.
                    if handle not in self._unwritten:
                        self.note(handle, gone)
                await asyncio.sleep(WRITE_INTERVAL)
            except Exception:
                # Whoever needs these finds them in the store.
                logger.exception("%d records are not written", len(batch))

    def _call(self, handle: str, gone: int | None, known: Known) -> Call | None:
        now = self._wall()
        if gone is not None:
            entry, ttl = Entry(handle, gone, now, None), GONE_TTL
        else:
            known_now = known(handle)
            if known_now is None:
                return None
            record, age = known_now
            if age > MAX_AGE:
                return None
            entry, ttl = Entry(handle, record.version, now - age, record), RECORD_TTL
        sealed = seal(self._vault, entry).decode()
        return (keys.tier(handle),), (sealed, ttl, keys.CHANGES, handle)

    async def fetch_start(self) -> Start | None:
        """Return what the latest start left, or None."""
        try:
            sealed = await self._redis.command("GET", keys.START)
            fields: Mapping[str, str] = orjson.loads(self._vault.unseal(sealed or b""))
            return Start(fields["schema"], bytes.fromhex(fields["mock_secret"]))
        except (RedisUnavailable, SecretUnreadable, ValueError, TypeError, KeyError):
            return None

    async def write_start(self, start: Start) -> None:
        """Leave what another start needs while the control plane is away."""
        fields = {"schema": start.schema, "mock_secret": start.mock_secret.hex()}
        try:
            sealed = self._vault.seal(orjson.dumps(fields))
            await self._redis.command("SET", keys.START, sealed)
        except RedisUnavailable as error:
            logger.warning("the next start needs the control plane: %s", error)
