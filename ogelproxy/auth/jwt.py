"""Tokens: HS256 by a shared secret, RS256 and ES256 by a published key set.

Which key may check a token follows from the algorithm and is fixed here; the
token only picks among the keys of its own algorithm, so `none` and a public key
posing as a shared secret find nothing (RFC 8725, sections 2.1 and 3.1). The
signature is PyJWT's work. Nothing of a token is ever part of a text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from ogelproxy.config import Auth
from ogelproxy.errors import ConfigInvalid, ControlUnavailable, CredentialRejected
from ogelproxy.tenants.model import Credential

log = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 16_384
#: RFC 7518: section 3.2 for a shared secret, section 3.3 for RSA.
MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048

MAX_KEY_SET_BYTES = 262_144
MAX_KEYS = 64
FETCH_TIMEOUT = 5.0
#: Seconds between fetches, however many tokens name keys that we don't have.
REFETCH_INTERVAL = 5.0
#: Seconds after which a key that was withdrawn is no longer believed …
KEYS_TTL = 300.0
#: … and how long keys are believed while their publisher can't be reached.
STALE_TTL = 3600.0

PublicKey = RSAPublicKey | EllipticCurvePublicKey


class KeySet:
    """The public keys behind a JWKS URL, fetched when one is asked for."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self._url = url
        self._clock = clock
        self._keys: dict[tuple[str, str], PublicKey] = {}  # (algorithm, kid) → key
        self._fetched_at = -math.inf  # when `_keys` was last replaced
        self._attempted_at = -math.inf  # when a fetch last ended, well or not
        # Whoever holds it fetches; the others wait for what he brings.
        self._lock = asyncio.Lock()

    async def find(self, algorithm: str, kid: str | None) -> PublicKey:
        """Return the key of this name; unnamed, the only one of its algorithm.

        Raises CredentialRejected when the set has no such key, and
        ControlUnavailable when the set can't be fetched.
        """
        key = self._known(algorithm, kid, KEYS_TTL)
        if key is not None:
            return key
        stale = self._known(algorithm, kid, STALE_TTL)
        if stale is not None and self._lock.locked():
            return stale
        async with self._lock:
            if self._clock() - self._attempted_at >= REFETCH_INTERVAL:
                await self._fetch()
        key = self._known(algorithm, kid, STALE_TTL)
        if key is not None:
            return key
        if self._attempted_at > self._fetched_at:
            raise ControlUnavailable("the key set for tokens can't be fetched")
        raise CredentialRejected("token names no key of the key set")

    def _known(self, algorithm: str, kid: str | None, ttl: float) -> PublicKey | None:
        if self._clock() - self._fetched_at > ttl:
            return None
        if kid is not None:
            return self._keys.get((algorithm, kid))
        fitting = [key for (of, _), key in self._keys.items() if of == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    async def _fetch(self) -> None:
        try:
            keys = read_keys(await self._download())
        except (OSError, TimeoutError, aiohttp.ClientError, ValueError) as error:
            log.warning("key set for tokens: %s", error or type(error).__name__)
            self._attempted_at = self._clock()
        else:
            self._keys = keys
            self._fetched_at = self._attempted_at = self._clock()

    async def _download(self) -> bytes:
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT)
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            # A redirect could lead from https to anywhere.
            session.get(self._url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"answered with status {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_KEY_SET_BYTES:
                    raise ValueError("is too large")
            return bytes(body)


def read_keys(text: bytes) -> dict[tuple[str, str], PublicKey]:
    """Read a key set (RFC 7517, section 5): its usable keys by algorithm and name.

    Keys of other kinds, for other uses, too short or malformed are left out. A
    key without a name gets one that no token has. Raises ValueError.
    """
    try:
        members = json.loads(text)["keys"]
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError("is not a key set") from error
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise ValueError("is not a key set, or one of too many keys")
    keys = {}
    for index, member in enumerate(members):
        found = _read_key(member) if isinstance(member, dict) else None
        if found is not None:
            algorithm, key = found
            name = member.get("kid")
            keys[algorithm, name if isinstance(name, str) else f"\0{index}"] = key
    return keys


def _read_key(member: dict[str, Any]) -> tuple[str, PublicKey] | None:
    if member.get("use", "sig") != "sig":
        return None
    try:
        if member.get("kty") == "RSA" and member.get("alg", "RS256") == "RS256":
            key: Any = RSAAlgorithm.from_jwk(member)
            if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
                return "RS256", key
        elif member.get("kty") == "EC" and member.get("alg", "ES256") == "ES256":
            key = ECAlgorithm.from_jwk(member)
            if isinstance(key, EllipticCurvePublicKey) and isinstance(
                key.curve, SECP256R1
            ):
                return "ES256", key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        log.warning("key set for tokens: a key is malformed")
    return None


class TokenVerifier:
    """Check tokens by what the settings name: a secret, a key set, or both."""

    def __init__(
        self,
        config: Auth,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigInvalid when the secret is too short to be one."""
        self._config = config
        self._wall_clock = wall_clock
        self._secret = b""
        if config.jwt_secret is not None:
            self._secret = config.jwt_secret.get_secret_value().encode()
            if len(self._secret) < MIN_SECRET_BYTES:
                raise ConfigInvalid(
                    f"auth.jwt_secret: needs {MIN_SECRET_BYTES} bytes or more"
                )
        self._key_set = (
            None if config.jwks_url is None else KeySet(config.jwks_url, clock=clock)
        )
        self._decoder = jwt.PyJWT()

    async def verify(self, token: str, handle: str) -> Credential:
        """Check that `token` was issued for this organisation and is valid now.

        Raises CredentialRejected with the reason for the log, or
        ControlUnavailable when the keys can't be had.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise CredentialRejected("token is too long")
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key = await self._key(header)
            claims = self._decoder.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._config.jwt_audience,
                options={
                    "require": ["exp"],
                    "verify_aud": self._config.jwt_audience is not None,
                    # Times are compared below, with the clock that we were given.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "enforce_minimum_key_length": True,
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise CredentialRejected(f"token: {type(error).__name__}") from None
        if _organization(claims) != handle:
            raise CredentialRejected("token is for another organisation")
        expires_at = self._check_times(claims)
        return Credential(handle, expires_at=expires_at)

    async def _key(self, header: dict[str, Any]) -> tuple[str, bytes | PublicKey]:
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm == "HS256" and self._secret:
            return algorithm, self._secret
        if algorithm in ("RS256", "ES256") and self._key_set is not None:
            return algorithm, await self._key_set.find(algorithm, kid)
        raise CredentialRejected("token is of an algorithm that isn't accepted")

    def _check_times(self, claims: dict[str, Any]) -> float:
        """Check `exp` and `nbf` (RFC 7519, section 4.1); return `exp`."""
        now, leeway = self._wall_clock(), self._config.jwt_leeway
        expires_at = _unix_time(claims["exp"])
        if expires_at + leeway <= now:
            raise CredentialRejected("token has expired")
        if "nbf" in claims and _unix_time(claims["nbf"]) - leeway > now:
            raise CredentialRejected("token is not valid yet")
        return expires_at


def _organization(claims: dict[str, Any]) -> str | None:
    """Return the claim `org_id`; None when there is none, or two that differ.

    It may stand in `app_metadata`, which only the issuer writes, but never in
    `user_metadata`, which the user does.
    """
    places = [claims, claims.get("app_metadata")]
    found = [p["org_id"] for p in places if isinstance(p, dict) and "org_id" in p]
    if not found or any(value != found[0] for value in found):
        return None
    return found[0] if isinstance(found[0], str) else None


def _unix_time(value: object) -> float:
    # json reads NaN and Infinity, and to NaN no time has come yet.
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
        if math.isfinite(seconds):
            return seconds
    raise CredentialRejected("token has a time that is none")
