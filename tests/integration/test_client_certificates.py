"""Client certificates: a condition beside the key, for one organisation each."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.fixtures.certificates import SLOWNESS, Authority, Issued
from tests.fixtures.engine import Organization, Proxy
from tests.fixtures.faults import RawClient, eventually
from tests.fixtures.postgres import Postgres
from tests.fixtures.secured import JWT_SECRET, SSL_REQUEST, token, trusting

NEEDED = "connections need a client certificate that names the organisation"


def guarded(
    rule: str, postgres: Postgres, authority: Authority, directory: Path
) -> Iterator[Proxy]:
    issued = authority.issue()
    proxy = Proxy(
        postgres,
        directory,
        {
            "JWT_SECRET": JWT_SECRET,
            "OGELPROXY_TLS_CERT": str(issued.cert),
            "OGELPROXY_TLS_KEY": str(issued.key),
            "OGELPROXY_TLS_CLIENT_CA": str(authority.cert),
            "OGELPROXY_TLS_CLIENT_CERTIFICATES": rule,
        },
    )
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def strict(
    postgres: Postgres,
    authority: Authority,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Organization]:
    """An organisation of a proxy that requires certificates."""
    directory = tmp_path_factory.mktemp("strict")
    for proxy in guarded("require", postgres, authority, directory):
        yield proxy.create_organization()


@pytest.fixture(scope="module")
def lenient(
    postgres: Postgres,
    authority: Authority,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Organization]:
    """An organisation of a proxy that allows certificates."""
    directory = tmp_path_factory.mktemp("lenient")
    for proxy in guarded("allow", postgres, authority, directory):
        yield proxy.create_organization()


def show(issued: Issued, **options: str) -> dict[str, str]:
    """What a client passes to libpq to show a certificate."""
    return {
        "sslmode": "require",
        "sslcert": str(issued.cert),
        "sslkey": str(issued.key),
    } | options


def is_let_in(organization: Organization, options: dict[str, str]) -> bool:
    """Whether a login with the right key works. Raises unless it is for this."""
    try:
        organization.connect(**options).close()
    except psycopg.OperationalError as error:
        assert NEEDED in str(error)
        return False
    return True


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_certificate_of_the_organization_gets_in_with_the_key(
    strict: Organization, authority: Authority, version: str, negotiation: str
) -> None:
    options = {"ssl_max_protocol_version": version, "sslnegotiation": negotiation}
    issued = authority.issue(strict.handle, is_client=True)
    assert is_let_in(strict, show(issued, channel_binding="require", **options))


def test_alternative_name_names_an_organization_too(
    strict: Organization, authority: Authority
) -> None:
    names = ("ogel:org_another", f"ogel:{strict.handle}")
    assert is_let_in(strict, show(authority.issue("x", names=names, is_client=True)))


def test_certificate_is_no_proof_without_the_key(
    strict: Organization, authority: Authority
) -> None:
    options = show(authority.issue(strict.handle, is_client=True))
    with pytest.raises(psycopg.OperationalError, match="password authentication"):
        psycopg.connect(strict.dsn(key="ogk_" + "x" * 32), **options)  # type: ignore[arg-type]


def test_token_needs_the_certificate_too(
    strict: Organization, authority: Authority
) -> None:
    dsn = strict.proxy.dsn(
        f"{strict.handle}.jwt", token(strict.handle, aud=None), "app"
    )
    issued = authority.issue(strict.handle, is_client=True)
    psycopg.connect(dsn, **show(issued)).close()  # type: ignore[arg-type]
    with pytest.raises(psycopg.OperationalError, match=NEEDED):
        psycopg.connect(dsn, sslmode="require")


@pytest.mark.parametrize("sslmode", ["require", "disable"])
def test_without_a_certificate_nobody_gets_in_where_it_is_required(
    strict: Organization, sslmode: str
) -> None:
    assert not is_let_in(strict, {"sslmode": sslmode})


@pytest.mark.parametrize("sslmode", ["require", "disable"])
def test_without_a_certificate_the_key_gets_in_where_it_is_allowed(
    lenient: Organization, sslmode: str
) -> None:
    assert is_let_in(lenient, {"sslmode": sslmode})


@pytest.mark.parametrize("fixture", ["strict", "lenient"])
@pytest.mark.parametrize(
    ("name", "alternative"),
    [
        ("org_another", "localhost"),
        ("{}x", "localhost"),
        ("x.{}", "localhost"),
        ("ogel:{}", "localhost"),
        ("", "ogel:org_another"),
        ("", "other:{}"),
        ("", "{}"),
    ],
)
def test_certificate_of_another_lets_nobody_in(
    request: pytest.FixtureRequest,
    authority: Authority,
    fixture: str,
    name: str,
    alternative: str,
) -> None:
    member: Organization = request.getfixturevalue(fixture)
    issued = authority.issue(
        name.format(member.handle) or "x",
        names=(alternative.format(member.handle),),
        is_client=True,
    )
    assert not is_let_in(member, show(issued))


@pytest.mark.parametrize("fixture", ["strict", "lenient"])
@pytest.mark.parametrize("flaw", ["authority", "expired", "early", "purpose"])
def test_certificate_with_a_flaw_ends_the_handshake(
    request: pytest.FixtureRequest,
    authority: Authority,
    tmp_path: Path,
    fixture: str,
    flaw: str,
) -> None:
    member: Organization = request.getfixturevalue(fixture)
    day = datetime.timedelta(days=1)
    if flaw == "authority":
        issued = Authority(tmp_path, "stranger").issue(member.handle, is_client=True)
    elif flaw == "expired":
        issued = authority.issue(member.handle, is_client=True, starts_at=-2 * day)
    elif flaw == "early":
        issued = authority.issue(member.handle, is_client=True, starts_at=day)
    else:
        issued = authority.issue(member.handle, is_client=False)
    with pytest.raises(psycopg.OperationalError, match="alert"):
        member.connect(**show(issued))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_session_that_is_taken_up_again_outlives_no_certificate(
    strict: Organization, authority: Authority, version: ssl.TLSVersion
) -> None:
    # Valid for 3 s more.
    lifetime = SLOWNESS + datetime.timedelta(seconds=3)
    issued = authority.issue(strict.handle, is_client=True, lifetime=lifetime)
    context = trusting()
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(issued.cert, issued.key)
    session: ssl.SSLSession | None = None
    answers: list[bytes] = []

    def ask() -> bytes:
        """Say who it is, in the session; return the kind of the answer."""
        nonlocal session
        with RawClient(strict.proxy) as client:
            client.send(SSL_REQUEST)
            assert client.socket.recv(1) == b"S"
            wrapped = context.wrap_socket(client.socket, session=session)
            client.socket = wrapped
            assert wrapped.session_reused == (session is not None)
            client.start(strict.handle, "app")
            answers.append(client.receive()[0])
            session = session or wrapped.session
        return answers[-1]

    assert ask() == b"R"
    eventually(lambda: ask() == b"E")
    assert answers[1] == b"R"


def test_certificates_need_an_authority(own_proxy: Proxy, authority: Authority) -> None:
    issued = authority.issue()
    own_proxy.settings |= {
        "OGELPROXY_TLS_CERT": str(issued.cert),
        "OGELPROXY_TLS_KEY": str(issued.key),
        "OGELPROXY_TLS_CLIENT_CERTIFICATES": "require",
    }
    with pytest.raises(AssertionError, match=r"needs tls\.client_ca"):
        own_proxy.start()
