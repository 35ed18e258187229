"""Tokens: claims, algorithms, and key sets from a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from ogelproxy.auth.jwt import (
    KEYS_TTL,
    MAX_KEYS,
    MAX_TOKEN_BYTES,
    REFETCH_INTERVAL,
    STALE_TTL,
    TokenVerifier,
    read_keys,
)
from ogelproxy.config import Auth, Secret
from ogelproxy.errors import ConfigInvalid, ControlUnavailable, CredentialRejected

NOW = 1_800_000_000.0
SECRET = "a shared secret of more than 32 bytes"
CLAIMS = {"org_id": "org_a", "exp": NOW + 60}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def verifier(**settings: Any) -> TokenVerifier:
    config = Auth(**{"jwt_secret": Secret(SECRET)} | settings)
    return TokenVerifier(config, wall_clock=lambda: NOW)


def sign(claims: dict[str, Any], key: Any = SECRET, **options: Any) -> str:
    return jwt.encode(claims, key, **{"algorithm": "HS256"} | options)


def by_hand(header: dict[str, Any], payload: bytes, key: str = SECRET) -> str:
    """Sign what PyJWT would not."""
    parts = [
        base64.urlsafe_b64encode(part).rstrip(b"=").decode()
        for part in (json.dumps(header).encode(), payload)
    ]
    algorithm = jwt.get_algorithm_by_name("HS256")
    signature = algorithm.sign(".".join(parts).encode(), key.encode())
    return ".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=").decode()])


async def refused(token: str, **settings: Any) -> str:
    with pytest.raises(CredentialRejected) as caught:
        await verifier(**settings).verify(token, "org_a")
    assert caught.value.client_text == CredentialRejected.client_text
    assert len(token) < 8 or token not in str(caught.value)
    return str(caught.value)


async def test_a_token_names_its_organisation_and_its_end() -> None:
    credential = await verifier().verify(sign(CLAIMS), "org_a")
    assert credential.handle == "org_a"
    assert credential.key_id is None
    assert credential.expires_at == NOW + 60


async def test_the_organisation_may_stand_in_app_metadata() -> None:
    claims = {"exp": NOW + 60, "app_metadata": {"org_id": "org_a"}}
    assert (await verifier().verify(sign(claims), "org_a")).handle == "org_a"


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"org_id": "org_b"},
        {"org_id": ["org_a"]},
        {"org_id": None},
        {"org_id": "org_a", "app_metadata": {"org_id": "org_b"}},
        {"org_id": "org_b", "app_metadata": {"org_id": "org_a"}},
        {"app_metadata": "org_a"},
        {"user_metadata": {"org_id": "org_a"}},
    ],
)
async def test_a_token_for_nobody_or_another_is_refused(claims: dict[str, Any]) -> None:
    text = await refused(sign({"exp": NOW + 60} | claims))
    assert text == "token is for another organisation"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": NOW - 5}, "token has expired"),
        ({"exp": NOW + 60, "nbf": NOW + 6}, "token is not valid yet"),
        ({"exp": float("nan")}, "token has a time that is none"),
        ({"exp": float("inf")}, "token has a time that is none"),
        ({"exp": 10**400}, "token has a time that is none"),
        ({"exp": "1900000000"}, "token has a time that is none"),
        ({"exp": True}, "token has a time that is none"),
        ({"exp": NOW + 60, "nbf": "soon"}, "token has a time that is none"),
        ({}, "token: MissingRequiredClaimError"),
        ({"exp": None}, "token: MissingRequiredClaimError"),
    ],
)
async def test_a_token_out_of_its_time_is_refused(
    claims: dict[str, Any], reason: str
) -> None:
    payload = json.dumps({"org_id": "org_a"} | claims).encode()
    token = by_hand({"alg": "HS256", "typ": "JWT"}, payload)
    assert await refused(token) == reason


async def test_a_little_clock_difference_is_forgiven() -> None:
    claims = {"org_id": "org_a", "exp": NOW - 4.5, "nbf": NOW + 4.5}
    assert await verifier().verify(sign(claims), "org_a")
    await refused(sign(claims), jwt_leeway=0.0)


async def test_the_audience_is_checked_when_one_is_set() -> None:
    token = sign(CLAIMS | {"aud": "authenticated"})
    assert await verifier().verify(token, "org_a")
    assert await verifier(jwt_audience="authenticated").verify(token, "org_a")
    assert "InvalidAudience" in await refused(token, jwt_audience="other")
    assert "MissingRequired" in await refused(sign(CLAIMS), jwt_audience="other")


async def test_a_token_of_another_secret_is_refused() -> None:
    token = sign(CLAIMS, "another secret of more than 32 bytes!")
    assert await refused(token) == "token: InvalidSignatureError"


async def test_without_settings_every_token_is_refused() -> None:
    assert "isn't accepted" in await refused(sign(CLAIMS), jwt_secret=None)


@pytest.mark.parametrize("algorithm", ["none", "None", "HS384", "HS512", "", None, 7])
async def test_no_other_algorithm_is_accepted(algorithm: Any) -> None:
    payload = json.dumps(CLAIMS).encode()
    token = by_hand({"alg": algorithm, "typ": "JWT"}, payload)
    await refused(token)
    await refused(token.rpartition(".")[0] + ".")


async def test_a_critical_extension_is_refused() -> None:
    header = {"alg": "HS256", "crit": ["exp"], "exp": 1}
    await refused(by_hand(header, json.dumps(CLAIMS).encode()))


async def test_a_long_token_is_refused_unread() -> None:
    assert await refused("x" * (MAX_TOKEN_BYTES + 1)) == "token is too long"
    token = sign(CLAIMS | {"pad": "x" * 12_000})
    assert len(token) < MAX_TOKEN_BYTES
    assert await verifier().verify(token, "org_a")


@pytest.mark.parametrize("text", [b"[" * 10_000, b"[]", b"1", b'{"a":' + b"9" * 5000])
async def test_json_that_chokes_a_parser_is_refused(text: bytes) -> None:
    await refused(by_hand({"alg": "HS256"}, text))
    head = base64.urlsafe_b64encode(text).rstrip(b"=").decode()
    await refused(f"{head}.e30.AAAA")


@given(st.text(max_size=200))
def test_arbitrary_text_is_refused_cleanly(text: str) -> None:
    asyncio.run(refused(text))


@given(position=st.integers(0, 10_000), char=st.characters(codec="ascii"))
@settings(max_examples=200)
def test_a_spoiled_token_is_refused(position: int, char: str) -> None:
    token = sign(CLAIMS)
    position %= len(token)
    spoiled = token[:position] + char + token[position + 1 :]
    signature = spoiled.rpartition(".")[2]
    try:
        is_same = spoiled.count(".") == 2 and (
            spoiled.rpartition(".")[0] == token.rpartition(".")[0]
            and base64.urlsafe_b64decode(signature + "=")
            == base64.urlsafe_b64decode(token.rpartition(".")[2] + "=")
        )
    except ValueError:
        is_same = False
    # The last character of a signature has two bits that mean nothing.
    if not is_same:
        asyncio.run(refused(spoiled))


def test_a_short_secret_ends_the_start_and_is_not_told() -> None:
    with pytest.raises(ConfigInvalid, match="needs 32 bytes") as caught:
        verifier(jwt_secret=Secret("short-one"))
    assert "short-one" not in str(caught.value)


class Publisher:
    """A server of key sets that counts who asks."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.body: bytes | None = None
        self.status = 200
        self.fetch_count = 0
        self.url = ""
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.fetch_count += 1
        self.asked.set()
        await self.may_answer.wait()
        body = self.body
        if body is None:
            body = json.dumps({"keys": self.keys}).encode()
        headers = {"Location": self.url} if self.status == 302 else None
        return web.Response(body=body, status=self.status, headers=headers)

    def publish(self, kid: str | None, key: Any, **members: Any) -> None:
        kind: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
        member = kind.to_jwk(key.public_key(), as_dict=True) | members
        self.keys.append(member if kid is None else member | {"kid": kid})


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    publisher = Publisher()
    app = web.Application()
    app.router.add_get("/jwks", publisher.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    publisher.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    try:
        yield publisher
    finally:
        publisher.may_answer.set()
        await runner.cleanup()


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def with_keys(publisher: Publisher, clock: Clock | None = None) -> TokenVerifier:
    config = Auth(jwks_url=publisher.url, jwt_secret=Secret(SECRET))
    return TokenVerifier(config, clock=clock or Clock(), wall_clock=lambda: NOW)


def signed(key: Any, kid: str | None = "one") -> str:
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return jwt.encode(
        CLAIMS, key, algorithm=algorithm, headers={"kid": kid} if kid else None
    )


async def test_rs256_and_es256_are_checked_by_the_key_they_name(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    publisher.publish("one", rsa_key, use="sig", alg="RS256")
    publisher.publish("two", ec_key)
    tokens = with_keys(publisher)
    assert await tokens.verify(signed(rsa_key), "org_a")
    assert await tokens.verify(signed(ec_key, "two"), "org_a")
    # Unnamed, each is the only one of its algorithm.
    assert await tokens.verify(signed(rsa_key, None), "org_a")
    assert publisher.fetch_count == 1
    with pytest.raises(CredentialRejected):
        await tokens.verify(signed(ec.generate_private_key(ec.SECP256R1()), "two"), "o")


async def test_a_public_key_is_no_shared_secret(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    publisher.publish("one", rsa_key)
    public = rsa_key.public_key()
    for text in (
        public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        json.dumps(publisher.keys[0]).encode(),
    ):
        header = {"alg": "HS256", "kid": "one"}
        token = by_hand(header, json.dumps(CLAIMS).encode(), text.decode())
        with pytest.raises(CredentialRejected, match="InvalidSignature"):
            await with_keys(publisher).verify(token, "org_a")


async def test_a_new_key_is_fetched_when_a_token_names_it(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    clock = Clock()
    tokens = with_keys(publisher, clock)
    publisher.publish("one", rsa_key)
    assert await tokens.verify(signed(rsa_key), "org_a")
    publisher.publish("two", ec_key)
    clock.now += REFETCH_INTERVAL
    assert await tokens.verify(signed(ec_key, "two"), "org_a")
    assert publisher.fetch_count == 2


async def test_unknown_names_cost_one_fetch_per_interval(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    clock = Clock()
    tokens = with_keys(publisher, clock)
    for number in range(20):
        with pytest.raises(CredentialRejected, match="names no key"):
            await tokens.verify(signed(rsa_key, f"unknown{number}"), "org_a")
    assert publisher.fetch_count == 1


async def test_a_withdrawn_key_is_not_believed_for_long(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    clock = Clock()
    tokens = with_keys(publisher, clock)
    publisher.publish("one", rsa_key)
    assert await tokens.verify(signed(rsa_key), "org_a")
    publisher.keys.clear()
    clock.now += KEYS_TTL + 1
    with pytest.raises(CredentialRejected):
        await tokens.verify(signed(rsa_key), "org_a")


async def test_known_keys_outlive_their_publisher_for_a_while(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    clock = Clock()
    tokens = with_keys(publisher, clock)
    publisher.publish("one", rsa_key)
    assert await tokens.verify(signed(rsa_key), "org_a")
    publisher.status = 503
    clock.now += KEYS_TTL + 1
    assert await tokens.verify(signed(rsa_key), "org_a")
    assert publisher.fetch_count == 2
    clock.now += STALE_TTL
    with pytest.raises(ControlUnavailable):
        await tokens.verify(signed(rsa_key), "org_a")


async def test_many_logins_share_one_fetch(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    tokens = with_keys(publisher)
    publisher.publish("one", rsa_key)
    publisher.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        logins = [
            group.create_task(tokens.verify(signed(rsa_key), "org_a"))
            for _ in range(50)
        ]
        await publisher.asked.wait()
        publisher.may_answer.set()
    assert all(login.result().handle == "org_a" for login in logins)
    assert publisher.fetch_count == 1


async def test_a_login_that_leaves_takes_no_other_with_it(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    tokens = with_keys(publisher)
    publisher.publish("one", rsa_key)
    publisher.may_answer.clear()
    first, second = (
        asyncio.create_task(tokens.verify(signed(rsa_key), "org_a")) for _ in range(2)
    )
    await publisher.asked.wait()
    first.cancel()
    publisher.may_answer.set()
    assert (await second).handle == "org_a"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_slow_refresh_holds_up_nobody_whose_key_is_known(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    clock = Clock()
    tokens = with_keys(publisher, clock)
    publisher.publish("one", rsa_key)
    assert await tokens.verify(signed(rsa_key), "org_a")
    clock.now += KEYS_TTL + 1
    publisher.asked.clear()
    publisher.may_answer.clear()
    refresher = asyncio.create_task(tokens.verify(signed(rsa_key), "org_a"))
    await publisher.asked.wait()
    assert await tokens.verify(signed(rsa_key), "org_a")
    assert not refresher.done()
    publisher.may_answer.set()
    assert await refresher


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (302, b""),
        (204, b""),
        (200, b"no json"),
        (200, b"[]"),
        (200, b'{"keys": {}}'),
        (200, b"[" * 100_000),
        (200, b'{"keys": [], "pad": "' + b"x" * 300_000 + b'"}'),
        (200, json.dumps({"keys": [{}] * (MAX_KEYS + 1)}).encode()),
        (200, b"\xff\xfe\x00"),
    ],
)
async def test_a_set_that_is_none_makes_the_service_unavailable(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey, status: int, body: bytes
) -> None:
    publisher.status, publisher.body = status, body
    with pytest.raises(ControlUnavailable):
        await with_keys(publisher).verify(signed(rsa_key), "org_a")
    assert publisher.fetch_count == 1


async def test_nobody_listening_makes_the_service_unavailable(
    publisher: Publisher, rsa_key: rsa.RSAPrivateKey
) -> None:
    # Port 1 of loopback: nothing listens there, and nothing is waited for.
    config = Auth(jwks_url="http://127.0.0.1:1/jwks")
    tokens = TokenVerifier(config, clock=Clock(), wall_clock=lambda: NOW)
    with pytest.raises(ControlUnavailable):
        await tokens.verify(signed(rsa_key), "org_a")


def test_only_keys_that_may_check_our_algorithms_are_read(
    rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    publisher = Publisher()
    publisher.publish("good", rsa_key)
    publisher.publish(None, ec_key)
    publisher.publish("encrypts", rsa_key, use="enc")
    publisher.publish("other algorithm", rsa_key, alg="RS512")
    publisher.publish("short", rsa.generate_private_key(65537, 1024))
    publisher.publish("curve", ec.generate_private_key(ec.SECP384R1()))
    private: dict[str, Any] = RSAAlgorithm.to_jwk(rsa_key, as_dict=True)
    publisher.keys += [
        private | {"kid": "private"},
        {"kty": "oct", "k": secrets.token_urlsafe(32), "kid": "shared"},
        {"kty": "RSA", "n": 7, "e": [], "kid": "broken"},
        {"kty": "EC", "crv": "P-256", "x": "", "y": "", "kid": "empty"},
        {"kty": "RSA", "kid": "nothing"},
    ]
    members = [*publisher.keys, "text", None]
    found = read_keys(json.dumps({"keys": members}).encode())
    assert set(found) == {("RS256", "good"), ("ES256", "\0001")}
