"""TLS towards clients: certificate, key, their dates and names."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from ogelproxy.config import Listen, Tls
from ogelproxy.doctor.finding import Finding, Now, fail, ok, warn
from ogelproxy.errors import ConfigInvalid
from ogelproxy.listener import load_tls

SUBJECT = "certificate"
RENEWAL = datetime.timedelta(days=21)
#: Names that are shown.
MAX_NAMED = 5


def examine(config: Tls, listen: Listen, now: Now) -> Iterator[Finding]:
    """Look at what `tls.cert` and `tls.key` name, as a start does."""
    try:
        is_on = load_tls(config) is not None
    except ConfigInvalid as error:
        yield fail(SUBJECT, str(error), "correct the settings or the files they name")
        return
    if not is_on:
        yield absent(listen)
        return
    assert config.cert is not None and config.key is not None
    moment = datetime.datetime.fromtimestamp(now(), datetime.UTC)
    certificate = x509.load_pem_x509_certificate(config.cert.read_bytes())
    yield dates(f"{SUBJECT} dates", certificate, moment)
    yield names(certificate)
    yield private(config.key)
    if config.client_ca is not None:
        for authority in x509.load_pem_x509_certificates(config.client_ca.read_bytes()):
            yield dates("client authority dates", authority, moment)


def absent(listen: Listen) -> Finding:
    if _is_loopback(listen.host):
        return ok(SUBJECT, "none; clients come from this machine only")
    return warn(
        SUBJECT,
        f"none, and listen.host is {listen.host}: data crosses the network in clear",
        "set tls.cert and tls.key",
    )


def dates(
    subject: str, certificate: x509.Certificate, moment: datetime.datetime
) -> Finding:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if moment < begins:
        return fail(
            subject,
            f"not valid before {begins:%Y-%m-%d %H:%M} UTC",
            "see that this machine's clock is right, or wait",
        )
    if moment >= ends:
        return fail(subject, f"expired on {ends:%Y-%m-%d %H:%M} UTC", "renew it")
    text = f"valid until {ends:%Y-%m-%d}"
    if ends - moment < RENEWAL:
        return warn(
            subject, f"{text}, {(ends - moment).days} days from now", "renew it"
        )
    return ok(subject, text)


def names(certificate: x509.Certificate) -> Finding:
    """Show what clients with sslmode=verify-full may call us."""
    subject = f"{SUBJECT} names"
    found: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        found += extension.value.get_values_for_type(x509.DNSName)
        found += map(str, extension.value.get_values_for_type(x509.IPAddress))
    if not found:
        return warn(
            subject,
            "none: clients that verify names refuse it",
            "have it issued with a subjectAltName",
        )
    more = ", …" if len(found) > MAX_NAMED else ""
    return ok(subject, ", ".join(found[:MAX_NAMED]) + more)


def private(key: Path) -> Finding:
    subject = "private key"
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        return warn(
            subject, f"{key}: mode {mode:o}, anybody may read it", f"chmod 600 {key}"
        )
    return ok(subject, f"{key}: mode {mode:o}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
