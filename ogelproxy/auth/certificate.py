"""What a certificate proves: which channel it ends, and whom it names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

#: The scheme of an alternative name that names an organisation.
SCHEME = "ogel:"


def end_point(certificate: x509.Certificate) -> bytes:
    """The certificate's hash for channel binding (RFC 5929, section 4.1)."""
    algorithm = certificate.signature_hash_algorithm
    name = "sha256" if algorithm is None else algorithm.name
    if name in ("md5", "sha1"):
        name = "sha256"
    encoded = certificate.public_bytes(Encoding.DER)
    return hashlib.new(name, encoded).digest()


def organizations(certificate: Mapping[str, Any]) -> set[str]:
    """The handles of the organisations that a client's certificate names.

    It names one as the common name of its subject, or any number as alternative
    names `URI:ogel:org_abc`. `certificate` is what `ssl.SSLSocket.getpeercert`
    returns for one that was verified.
    """
    common = {
        value
        for part in certificate.get("subject", ())
        for name, value in part
        if name == "commonName"
    }
    alternative = {
        value.removeprefix(SCHEME)
        for kind, value in certificate.get("subjectAltName", ())
        if kind == "URI" and value.startswith(SCHEME)
    }
    return common | alternative
