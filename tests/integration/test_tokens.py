"""Layer 1 by token: who gets in with which, and from where."""

from __future__ import annotations

import base64
import os
from typing import Any

import psycopg
import pytest

from ogelproxy.protocol import messages
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient
from tests.fixtures.secured import REJECTED, connects, token, unsigned


def test_token_gets_in_by_the_user_name(secured_member: Organization) -> None:
    handle = secured_member.handle
    dsn = secured_member.proxy.dsn(f"{handle}.jwt", token(handle), "app")
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)


def test_token_gets_in_by_a_startup_option(secured_member: Organization) -> None:
    handle = secured_member.handle
    dsn = secured_member.proxy.dsn(handle, token(handle), "app")
    with psycopg.connect(dsn, options="-c ogel.auth=jwt") as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)


def test_token_may_name_its_organization_in_app_metadata(
    secured_member: Organization,
) -> None:
    handle = secured_member.handle
    issued = token(handle, org_id=None, app_metadata={"org_id": handle})
    assert connects(secured_member.proxy.dsn(f"{handle}.jwt", issued, "app"))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"exp": None},
        {"nbf": 4102444800},
        {"aud": "somebody else"},
        {"aud": None},
        {"org_id": "org_another"},
        {"org_id": None},
        {"org_id": None, "user_metadata": {"org_id": "org_any"}},
        {"app_metadata": {"org_id": "org_another"}},
        {"secret": "another secret of more than 32 bytes"},
    ],
    ids=lambda claims: " ".join(f"{name}={claims[name]}" for name in claims),
)
def test_token_that_is_not_for_now_and_here_is_rejected(
    secured_member: Organization, claims: dict[str, Any]
) -> None:
    handle = secured_member.handle
    # Each from a network of its own, so that no failure budget runs out.
    refused = log_in_by_token(secured_member, token(handle, **claims))
    assert refused == REJECTED


@pytest.mark.parametrize("kind", ["unsigned", "changed", "key", "garbage", "brackets"])
def test_token_that_is_forged_is_rejected(
    secured_member: Organization, kind: str
) -> None:
    handle = secured_member.handle
    head, body, signature = token(handle).split(".")
    forged = {
        "unsigned": unsigned(handle),
        "changed": f"{head}.{token('org_another').split('.')[1]}.{signature}",
        "key": secured_member.key,
        "garbage": "a.b.c",
        "brackets": f"{head}.{base64.b64encode(b'[' * 5000).decode()}.{signature}",
    }[kind]
    assert body not in forged
    assert log_in_by_token(secured_member, forged) == REJECTED


def test_token_of_an_unknown_organization_is_rejected(secured: Proxy) -> None:
    handle = f"org_none_{os.urandom(4).hex()}"
    with RawClient(secured) as client:
        client.start(f"{handle}.jwt", "app")
        assert client.receive() == (b"R", b"\0\0\0\3")
        client.send(messages.message(b"p", token(handle).encode() + b"\0"))
        assert client.refusal() == REJECTED


def log_in_by_token(organization: Organization, password: str) -> dict[str, str]:
    """Return the refusal of a token, sent from a network of its own."""
    source = f"127.{os.urandom(1)[0]}.{os.urandom(1)[0]}.1"
    with RawClient(organization.proxy, source=source) as client:
        client.start(f"{organization.handle}.jwt", "app")
        assert client.receive() == (b"R", b"\0\0\0\3")
        client.send(messages.message(b"p", password.encode() + b"\0"))
        return client.refusal()


def test_proxy_without_a_secret_accepts_no_token(organization: Organization) -> None:
    assert log_in_by_token(organization, token(organization.handle)) == REJECTED
    assert log_in_by_token(organization, unsigned(organization.handle)) == REJECTED


@pytest.mark.parametrize("is_suffixed", [True, False], ids=["suffix", "option"])
def test_token_from_afar_is_not_even_asked_for_without_tls(
    secured_member: Organization, outside: str, is_suffixed: bool
) -> None:
    user = secured_member.handle + ".jwt" * is_suffixed
    options = "" if is_suffixed else "-c ogel.auth=jwt"
    with RawClient(secured_member.proxy, outside) as client:
        client.send(
            messages.startup({"user": user, "database": "app", "options": options})
        )
        (kind, body), *rest = client.to_end()
    assert kind == b"E"
    assert not rest
    assert messages.read_fields(body) == {
        "S": "FATAL",
        "V": "FATAL",
        "C": "28000",
        "M": "token login needs TLS: connect with sslmode=require",
    }


def test_token_needs_no_tls_from_any_loopback_address(
    secured_member: Organization,
) -> None:
    handle = secured_member.handle
    with RawClient(secured_member.proxy, source="127.1.2.3") as client:
        client.start(f"{handle}.jwt", "app")
        assert client.receive() == (b"R", b"\0\0\0\3")
        client.send(messages.message(b"p", token(handle).encode() + b"\0"))
        assert client.until(b"Z")[-1][1] == b"I"


def test_token_from_afar_gets_in_over_tls(
    secured_member: Organization, outside: str
) -> None:
    handle = secured_member.handle
    with psycopg.connect(
        secured_member.proxy.dsn(f"{handle}.jwt", token(handle), "app"),
        hostaddr=outside,
        sslmode="require",
    ) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)


def test_key_from_afar_needs_no_tls(secured_member: Organization, outside: str) -> None:
    with psycopg.connect(
        secured_member.dsn(), hostaddr=outside, sslmode="disable"
    ) as connection:
        assert connection.execute("SELECT 42").fetchone() == (42,)
