"""SCRAM: the RFC's vector, round trips, and everything that is not one."""

from __future__ import annotations

import base64
import re
import string
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql

from ogelproxy.auth import scram
from ogelproxy.auth.scram import (
    SCRAM_SHA_256,
    SCRAM_SHA_256_PLUS,
    ScramClient,
    ScramServer,
    derive,
    make_verifier,
    md5_password,
    mock_salt,
    prepare_password,
)
from ogelproxy.errors import CredentialRejected, ProtocolViolation
from ogelproxy.tenants.model import KeyVerifier
from tests.fixtures.postgres import Postgres

SALT = bytes(range(16))
ITERATIONS = 2
BINDING = bytes(range(32))

#: RFC 7677, section 3.
RFC_USER, RFC_PASSWORD = "user", "pencil"
RFC_CLIENT_NONCE = b"rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_NONCE = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
RFC_SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
RFC_CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_FIRST = (
    b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
    b"s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
)
RFC_CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
    b"p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
RFC_SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

#: What a client may send: any bytes but zero, as Python keeps them in a str.
passwords = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    st.binary(min_size=1, max_size=40).map(
        lambda raw: raw.replace(b"\0", b"x").decode("utf-8", "surrogateescape")
    ),
)


def key(secret: str, salt: bytes = SALT, iterations: int = ITERATIONS) -> KeyVerifier:
    return KeyVerifier(uuid4(), "key", *make_verifier(secret, salt, iterations))


def serve(*keys: KeyVerifier, binding: bytes | None = None) -> ScramServer:
    return ScramServer(keys, SALT, ITERATIONS, channel_binding=binding)


def log_in(client: ScramClient, server: ScramServer) -> UUID:
    challenge = server.first(client.mechanism, client.first())
    answer, found = server.final(client.final(challenge))
    client.verify(answer)
    return found.id


def test_both_sides_speak_the_vector_of_rfc_7677(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scram, "_fresh_nonce", lambda: RFC_CLIENT_NONCE)
    client = ScramClient(RFC_USER, RFC_PASSWORD)
    monkeypatch.setattr(scram, "_fresh_nonce", lambda: RFC_SERVER_NONCE)
    verifier = key(RFC_PASSWORD, RFC_SALT, 4096)
    server = ScramServer([verifier], RFC_SALT, 4096, channel_binding=None)

    assert client.first() == RFC_CLIENT_FIRST
    assert server.first(SCRAM_SHA_256, RFC_CLIENT_FIRST) == RFC_SERVER_FIRST
    assert client.challenge(RFC_SERVER_FIRST) == (RFC_SALT, 4096)
    keys = derive(RFC_PASSWORD, RFC_SALT, 4096)
    assert client.final(RFC_SERVER_FIRST, keys) == RFC_CLIENT_FINAL
    assert server.final(RFC_CLIENT_FINAL) == (RFC_SERVER_FINAL, verifier)
    client.verify(RFC_SERVER_FINAL)


@given(
    secrets=st.lists(passwords, min_size=1, max_size=4, unique_by=prepare_password),
    index=st.integers(0, 3),
    is_bound=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_any_of_several_keys_logs_in_and_is_the_one_that_is_named(
    secrets: list[str], index: int, is_bound: bool
) -> None:
    binding = BINDING if is_bound else None
    keys = [key(secret) for secret in secrets]
    server = serve(*keys, binding=binding)
    chosen = index % len(keys)
    client = ScramClient(
        "org_a,b=c",
        secrets[chosen],
        offered=server.mechanisms,
        channel_binding=binding,
    )
    assert log_in(client, server) == keys[chosen].id


@given(secret=passwords, guess=passwords)
@settings(max_examples=30, deadline=None)
def test_a_wrong_key_is_rejected(secret: str, guess: str) -> None:
    server = serve(key(secret))
    client = ScramClient("org_a", guess)
    challenge = server.first(client.mechanism, client.first())
    answer = client.final(challenge)
    if prepare_password(guess) == prepare_password(secret):
        server.final(answer)
    else:
        with pytest.raises(CredentialRejected):
            server.final(answer)


def test_a_mock_exchange_looks_like_a_real_one_and_ends_like_a_wrong_key() -> None:
    texts = []
    for server in (serve(), serve(key("right"))):
        client = ScramClient("org_a", "wrong")
        challenge = server.first(client.mechanism, client.first())
        assert re.fullmatch(rb"r=[!-+\--~]+,s=[\w+/]{22}==,i=2", challenge)
        with pytest.raises(CredentialRejected) as caught:
            server.final(client.final(challenge))
        texts.append((caught.value.client_text, caught.value.detail, caught.value.hint))
    assert texts[0] == texts[1]


#: How a message is spoiled: cut, one byte changed, bytes put in.
spoilers = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 400), st.just(b"")),
    st.tuples(st.just("flip"), st.integers(0, 400), st.binary(min_size=1, max_size=1)),
    st.tuples(
        st.just("insert"), st.integers(0, 400), st.binary(min_size=1, max_size=9)
    ),
)


def spoil(message: bytes, how: tuple[str, int, bytes]) -> bytes:
    kind, position, data = how
    position %= len(message)
    if kind == "cut":
        return message[:position]
    tail = message[position + (kind == "flip") :]
    return message[:position] + data + tail


@given(how=spoilers, is_bound=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_spoiled_first_message_never_logs_in(
    how: tuple[str, int, bytes], is_bound: bool
) -> None:
    binding = BINDING if is_bound else None
    server = serve(key("secret"), binding=binding)
    client = ScramClient(
        "org_a", "secret", offered=server.mechanisms, channel_binding=binding
    )
    spoiled = spoil(client.first(), how)
    if spoiled == client.first():
        return
    with pytest.raises((CredentialRejected, ProtocolViolation)):
        server.final(client.final(server.first(client.mechanism, spoiled)))


@given(how=spoilers, is_bound=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_spoiled_final_message_never_logs_in(
    how: tuple[str, int, bytes], is_bound: bool
) -> None:
    binding = BINDING if is_bound else None
    server = serve(key("secret"), binding=binding)
    client = ScramClient(
        "org_a", "secret", offered=server.mechanisms, channel_binding=binding
    )
    final = client.final(server.first(client.mechanism, client.first()))
    spoiled = spoil(final, how)
    if spoiled == final:
        return
    with pytest.raises((CredentialRejected, ProtocolViolation)):
        server.final(spoiled)


@given(how=spoilers)
@settings(max_examples=300, deadline=None)
def test_a_spoiled_challenge_never_leads_to_a_login(
    how: tuple[str, int, bytes],
) -> None:
    server = serve(key("secret"))
    client = ScramClient("org_a", "secret")
    challenge = server.first(client.mechanism, client.first())
    spoiled = spoil(challenge, how)
    if spoiled == challenge:
        return
    keys = derive("secret", SALT, ITERATIONS)
    with pytest.raises((CredentialRejected, ProtocolViolation)):
        server.final(client.final(spoiled, keys))


@given(how=spoilers)
@settings(max_examples=300, deadline=None)
def test_a_client_believes_no_spoiled_signature(how: tuple[str, int, bytes]) -> None:
    server = serve(key("secret"))
    client = ScramClient("org_a", "secret")
    challenge = server.first(client.mechanism, client.first())
    answer, _ = server.final(client.final(challenge))
    spoiled = spoil(answer, how)
    # Extensions may follow the signature; nobody signs them.
    if spoiled.split(b",")[0] == answer:
        return
    with pytest.raises(ProtocolViolation):
        client.verify(spoiled)


@given(data=st.binary(max_size=1200))
@settings(max_examples=300)
def test_arbitrary_bytes_are_refused_cleanly(data: bytes) -> None:
    client = ScramClient("org_a", "secret")
    server = serve(key("secret"))
    with pytest.raises(ProtocolViolation):
        server.first(SCRAM_SHA_256, data)
    with pytest.raises(ProtocolViolation):
        server.final(data)
    with pytest.raises(ProtocolViolation):
        client.final(data)
    with pytest.raises(ProtocolViolation):
        client.verify(data)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"n",
        b"n,",
        b"n,,",
        b"n,,n=user",
        b"n,,n=,r=",
        b"n,,r=abc,n=user",
        b"n,,m=ext,n=user,r=abc",
        b"n,,n=user,r=abc,m=ext",
        b"n,,n=us\0er,r=abc",
        b"n,,n=user,r=a c",
        b"n,,n=user,r=a\xc3\xa9",
        b"n,,n=user,r=" + b"x" * 257,
        b"n,,n=" + b"x" * 1100 + b",r=abc",
        b"n,a=admin,n=user,r=abc",
        b"x,,n=user,r=abc",
        b"p=tls-server-end-point,,n=user,r=abc",
        b"n,,n=user,r=abc,",
        b"n,,n=user,r=abc,1=x",
    ],
)
def test_a_malformed_first_message_is_a_violation(message: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        serve(key("secret")).first(SCRAM_SHA_256, message)


def test_a_proof_has_one_spelling_only() -> None:
    server = serve(key("secret"))
    client = ScramClient("org_a", "secret")
    final = client.final(server.first(client.mechanism, client.first()))
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    # 32 bytes leave two bits of the last letter unused: set one of them.
    letter = alphabet[alphabet.index(chr(final[-2])) + 1].encode()
    other = final[:-2] + letter + b"="
    assert base64.b64decode(other[-44:]) == base64.b64decode(final[-44:])
    with pytest.raises(ProtocolViolation, match="base64"):
        server.final(other)


def test_a_proof_over_another_nonce_is_refused_though_the_key_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(key("secret"))
    client = ScramClient("org_a", "secret")
    challenge = server.first(client.mechanism, client.first())
    monkeypatch.setattr(client, "_read_first", lambda _: (b"another", SALT, ITERATIONS))
    with pytest.raises(ProtocolViolation, match="nonce"):
        server.final(client.final(challenge))


def test_an_unknown_optional_extension_is_ignored() -> None:
    message = b"n,,n=user,r=abc,x=anything"
    challenge = serve(key("secret")).first(SCRAM_SHA_256, message)
    assert challenge.startswith(b"r=abc")


def test_a_client_that_was_told_of_no_channel_binding_is_refused() -> None:
    server = serve(key("secret"), binding=BINDING)
    client = ScramClient("org_a", "secret", channel_binding=BINDING)
    assert client.first().startswith(b"y,,")
    with pytest.raises(ProtocolViolation, match="negotiated down"):
        server.first(client.mechanism, client.first())


def test_the_plus_mechanism_comes_first_and_only_with_tls() -> None:
    assert serve().mechanisms == (SCRAM_SHA_256,)
    assert serve(binding=BINDING).mechanisms == (SCRAM_SHA_256_PLUS, SCRAM_SHA_256)
    with pytest.raises(ProtocolViolation):
        serve().first(SCRAM_SHA_256_PLUS, b"p=tls-server-end-point,,n=,r=abc")


@pytest.mark.parametrize("flag", [b"n", b"y", b"p=tls-unique", b"p="])
def test_the_plus_mechanism_needs_its_own_binding_flag(flag: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        serve(binding=BINDING).first(SCRAM_SHA_256_PLUS, flag + b",,n=,r=abc")


def test_a_client_bound_to_another_channel_is_rejected() -> None:
    server = serve(key("secret"), binding=BINDING)
    client = ScramClient(
        "org_a", "secret", offered=server.mechanisms, channel_binding=BINDING[::-1]
    )
    challenge = server.first(client.mechanism, client.first())
    with pytest.raises(CredentialRejected, match="another TLS channel"):
        server.final(client.final(challenge))


def test_an_unbound_client_is_served_where_binding_is_offered() -> None:
    verifier = key("secret")
    server = serve(verifier, binding=BINDING)
    client = ScramClient("org_a", "secret", offered=server.mechanisms)
    assert log_in(client, server) == verifier.id


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"i=2", b"i=0"),
        (b"i=2", b"i=-2"),
        (b"i=2", b"i=02"),
        (b"i=2", b"i=1000001"),
        (b"i=2", b"i=99999999999"),
        (b"s=", b"s=%"),
        (b"r=", b"r=x"),
        (b"r=", b"m=x,r="),
    ],
)
def test_a_client_refuses_a_challenge_that_is(old: bytes, new: bytes) -> None:
    client = ScramClient("org_a", "secret")
    challenge = serve(key("secret")).first(client.mechanism, client.first())
    with pytest.raises(ProtocolViolation) as caught:
        client.challenge(challenge.replace(old, new, 1))
    assert caught.value.by == "server"


def test_a_client_refuses_a_nonce_to_which_the_server_added_nothing() -> None:
    client = ScramClient("org_a", "secret")
    nonce = client.first().rpartition(b"r=")[2]
    with pytest.raises(ProtocolViolation):
        client.challenge(b"r=" + nonce + b",s=AAAA,i=4096")


def test_a_client_verifies_nothing_before_it_has_answered() -> None:
    client = ScramClient("org_a", "secret")
    with pytest.raises(ProtocolViolation):
        client.verify(b"v=")


def test_a_client_needs_a_mechanism_it_knows() -> None:
    with pytest.raises(ProtocolViolation, match="no common SASL mechanism"):
        ScramClient("org_a", "secret", offered=["OAUTHBEARER"])


def test_a_mock_salt_is_stable_by_name_and_secret() -> None:
    assert mock_salt("org_a", b"x") == mock_salt("org_a", b"x")
    assert len(mock_salt("org_a", b"x")) == scram.SALT_BYTES
    others = {mock_salt("org_b", b"x"), mock_salt("org_a", b"y")}
    assert len(others | {mock_salt("org_a", b"x")}) == 3


def test_secrets_are_in_no_repr() -> None:
    keys = derive("secret", SALT, ITERATIONS)
    assert repr(keys) == "ScramKeys()"
    assert "stored_key" not in repr(key("secret"))


#: The examples of RFC 4013, section 3, and what Postgres makes of the others.
@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        ("user", b"user"),
        ("\x07bell", b"\x07bell"),
        ("I\u00adX", b"IX"),
        ("\u00aa", b"a"),
        ("\u2168", b"IX"),
        ("a\u00a0b", b"a b"),
        ("a\u200bb", b"a b"),
        ("\u00ad", "\u00ad".encode()),
        ("\u0627\u0031", "\u0627\u0031".encode()),
        ("\u0627\u2168", "\u0627\u2168".encode()),
        ("\u0007\u00e9", "\u0007\u00e9".encode()),
        ("\u2168\u0221", "\u2168\u0221".encode()),
        ("caf\udce9", b"caf\xe9"),
    ],
)
def test_a_password_is_prepared_as_by_postgres(password: str, prepared: bytes) -> None:
    assert prepare_password(password) == prepared


@pytest.mark.parametrize(
    "password",
    [
        "plain",
        "I\u00adX",
        "\u2168",
        "a\u200bb",
        "\u0627\u0031",
        "\u2168\u0221",
        "é\u00a0ﬁ",
    ],
)
def test_postgres_makes_the_same_verifier(postgres: Postgres, password: str) -> None:
    role = postgres.create_role()
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                sql.Identifier(role), sql.Literal(password)
            )
        )
        row = connection.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)
        ).fetchone()
    assert row is not None
    head, tail = row[0].removeprefix("SCRAM-SHA-256$").split("$")
    count, salt = head.split(":")
    stored_key, server_key = (base64.b64decode(part) for part in tail.split(":"))
    made = make_verifier(password, base64.b64decode(salt), int(count))
    assert made == (stored_key, server_key)


def test_postgres_has_the_same_md5_hash(postgres: Postgres) -> None:
    role = postgres.create_role(encryption="md5")
    with psycopg.connect(postgres.dsn()) as connection:
        row = connection.execute(
            "SELECT 'md5' || md5(substr(rolpassword, 4) || 'salt') "
            "FROM pg_authid WHERE rolname = %s",
            (role,),
        ).fetchone()
    assert row is not None
    hashed = md5_password(role, postgres.password(role), b"salt")
    assert hashed.decode() == row[0]
