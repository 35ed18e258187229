"""SCRAM-SHA-256, both sides of it, without I/O (RFC 5802, RFC 7677).

`ScramServer` checks a client that knows one of several keys; `ScramClient` logs
in to a server. The messages are those of SASL: how they travel inside
Authentication messages (Postgres manual, 55.3) is known to `auth` and to the
server connection. Stretching a password is a function of its own, `derive`,
for a caller that runs it in a thread and keeps what it gives.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ogelproxy.errors import CredentialRejected, ProtocolViolation
from ogelproxy.tenants.model import KeyVerifier

SCRAM_SHA_256 = "SCRAM-SHA-256"
SCRAM_SHA_256_PLUS = "SCRAM-SHA-256-PLUS"
#: The one kind of channel binding that Postgres knows (RFC 5929, section 4).
BINDING_TYPE = b"tls-server-end-point"

#: Postgres' own numbers (src/include/common/scram-common.h).
SALT_BYTES = 16
ITERATIONS = 4096
NONCE_BYTES = 18
HASH_BYTES = 32

#: What Postgres takes from a client (PG_MAX_SASL_MESSAGE_LENGTH).
MAX_MESSAGE_BYTES = 1024
#: A hostile server must not buy hours of CPU: a quarter of a second of it.
MAX_ITERATIONS = 1_000_000

#: `printable` of RFC 5802, section 7: all visible ASCII but the comma.
NONCE = re.compile(rb"[\x21-\x2b\x2d-\x7e]{1,256}")
#: Attributes and their values, `m=` not among them (as above, section 5.1).
ATTRIBUTES = re.compile(rb"[A-Za-ln-z]=[^,\0]*(?:,[A-Za-ln-z]=[^,\0]*)*")
COUNT = re.compile(rb"[1-9][0-9]{0,9}")

Attributes = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """What a client derives from a password for one salt and iteration count."""

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


def prepare_password(password: str) -> bytes:
    """Normalise a password with SASLprep just as Postgres does (RFC 4013).

    Bytes that are not UTF-8 come and go as lone surrogates (PEP 383).
    ASCII passes as it is. A password that SASLprep prohibits is used raw, and
    the prohibitions are looked for before NFKC: both are Postgres' choices
    (src/common/saslprep.c), and any other choice would lock somebody out.
    """
    raw = password.encode("utf-8", "surrogateescape")
    if password.isascii():
        return raw
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char
        for char in password
        # U+200B is in both tables; a space it becomes, as in Postgres.
        if stringprep.in_table_c12(char) or not stringprep.in_table_b1(char)
    )
    if not mapped or any(map(_is_prohibited, mapped)) or not _is_bidi_sound(mapped):
        return raw
    return unicodedata.normalize("NFKC", mapped).encode()


def _is_prohibited(char: str) -> bool:
    return (
        stringprep.in_table_a1(char)
        or stringprep.in_table_c12(char)
        or stringprep.in_table_c21_c22(char)
        or stringprep.in_table_c3(char)
        or stringprep.in_table_c4(char)
        or stringprep.in_table_c5(char)
        or stringprep.in_table_c6(char)
        or stringprep.in_table_c7(char)
        or stringprep.in_table_c8(char)
        or stringprep.in_table_c9(char)
    )


def _is_bidi_sound(text: str) -> bool:
    # RFC 3454, section 6.
    if not any(map(stringprep.in_table_d1, text)):
        return True
    return (
        stringprep.in_table_d1(text[0])
        and stringprep.in_table_d1(text[-1])
        and not any(map(stringprep.in_table_d2, text))
    )


def derive(password: str, salt: bytes, iterations: int) -> ScramKeys:
    """Stretch a password; about 1 ms of CPU for 4096 iterations, GIL released."""
    salted = hashlib.pbkdf2_hmac("sha256", prepare_password(password), salt, iterations)
    return ScramKeys(_hmac(salted, b"Client Key"), _hmac(salted, b"Server Key"))


def make_verifier(secret: str, salt: bytes, iterations: int) -> tuple[bytes, bytes]:
    """Return the (stored key, server key) by which `secret` is checked later."""
    keys = derive(secret, salt, iterations)
    return _sha256(keys.client_key), keys.server_key


@lru_cache(4096)  # of known organisations too: both take as long
def mock_salt(handle: str, secret: bytes) -> bytes:
    """Return the salt of an organisation that doesn't exist: always the same one.

    Without `secret` it can't be told from a real one (RFC 5802, section 9; as
    Postgres' mock authentication nonce).
    """
    return _hmac(secret, handle.encode())[:SALT_BYTES]


def md5_password(user: str, password: str, salt: bytes) -> bytes:
    """Return the answer to AuthenticationMD5Password (manual 55.2.1)."""

    def md5(data: bytes) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).hexdigest().encode()

    text = (password + user).encode("utf-8", "surrogateescape")
    return b"md5" + md5(md5(text) + salt)


class ScramServer:
    """Check one client against the live keys of an organisation.

    Call `first`, then `final`, once each. Without keys the exchange is a mock:
    it looks like any other and ends as with a wrong key. `channel_binding` is
    the tls-server-end-point hash of our certificate; None without TLS.
    """

    def __init__(
        self,
        keys: Sequence[KeyVerifier],
        salt: bytes,
        iterations: int,
        *,
        channel_binding: bytes | None,
    ) -> None:
        self._keys = keys
        self._salt = salt
        self._iterations = iterations
        self._channel_binding = channel_binding
        self._nonce = b""  # the client's part, then ours; set by `first`
        self._binding_input = b""  # what `c=` must hold; set by `first`
        self._messages = b""  # AuthMessage up to the server's first one

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What is offered to the client, best first."""
        if self._channel_binding is None:
            return (SCRAM_SHA_256,)
        return (SCRAM_SHA_256_PLUS, SCRAM_SHA_256)

    def first(self, mechanism: str, data: bytes) -> bytes:
        """Read client-first-message, return server-first-message.

        Raises ProtocolViolation, also when the client was made to believe that
        we offer no channel binding (RFC 5802, section 6).
        """
        if mechanism not in self.mechanisms:
            raise ProtocolViolation("SASL mechanism was not offered")
        _check_length(data)
        flag, _, rest = data.partition(b",")
        authorization, comma, bare = rest.partition(b",")
        if not comma:
            raise ProtocolViolation("SCRAM message has no GS2 header")
        if authorization:
            raise ProtocolViolation("SCRAM authorization identity is not supported")
        self._binding_input = flag + b",," + self._check_flag(flag, mechanism)
        # The name is ignored, as by Postgres: the startup packet has said it.
        _, client_nonce, *_ = _read(bare, b"nr")
        if not NONCE.fullmatch(client_nonce):
            raise ProtocolViolation("SCRAM nonce is malformed")
        self._nonce = client_nonce + _fresh_nonce()
        server_first = b"r=%b,s=%b,i=%d" % (
            self._nonce,
            base64.b64encode(self._salt),
            self._iterations,
        )
        self._messages = bare + b"," + server_first
        return server_first

    def _check_flag(self, flag: bytes, mechanism: str) -> bytes:
        """Return the data that the flag binds the exchange to."""
        if mechanism == SCRAM_SHA_256_PLUS:
            if flag != b"p=" + BINDING_TYPE or self._channel_binding is None:
                raise ProtocolViolation("SCRAM channel binding type is not supported")
            return self._channel_binding
        if flag == b"y" and self._channel_binding is not None:
            raise ProtocolViolation("SCRAM channel binding was negotiated down")
        if flag not in (b"n", b"y"):
            raise ProtocolViolation("SCRAM channel binding flag is malformed")
        return b""

    def final(self, data: bytes) -> tuple[bytes, KeyVerifier]:
        """Read client-final-message, return server-final-message and the key.

        Raises CredentialRejected when no key fits, or when the client is bound
        to another TLS channel than ours; ProtocolViolation.
        """
        _check_length(data)
        without_proof, _, proof_text = data.rpartition(b",p=")
        binding, nonce, *_ = _read(without_proof, b"cr")
        proof = _decode(proof_text)
        if len(proof) != HASH_BYTES:
            raise ProtocolViolation("SCRAM proof is malformed")
        if not hmac.compare_digest(nonce, self._nonce):
            raise ProtocolViolation("SCRAM nonce does not match")
        if not hmac.compare_digest(_decode(binding), self._binding_input):
            if self._binding_input.startswith(b"p"):
                raise CredentialRejected("SCRAM is bound to another TLS channel")
            raise ProtocolViolation("SCRAM channel binding does not match")
        auth_message = self._messages + b"," + without_proof
        key = self._find_key(proof, auth_message)
        if key is None:
            raise CredentialRejected(
                "no live key fits" if self._keys else "there is no live key"
            )
        signature = _hmac(key.server_key, auth_message)
        return b"v=" + base64.b64encode(signature), key

    def _find_key(self, proof: bytes, auth_message: bytes) -> KeyVerifier | None:
        found = None
        # Every key is tried whichever fits, and a mock costs what one key costs.
        for key in self._keys or (None,):
            stored_key = key.stored_key if key else bytes(HASH_BYTES)
            client_key = _xor(proof, _hmac(stored_key, auth_message))
            if hmac.compare_digest(_sha256(client_key), stored_key):
                found = key
        return found


class ScramClient:
    """Log in to a server: `first`, `final`, `verify`, once each.

    `offered` are the server's mechanisms. `channel_binding` is the
    tls-server-end-point hash of its certificate; None without TLS. `mechanism`
    is the one that was chosen. All methods raise ProtocolViolation by the
    server.
    """

    def __init__(
        self,
        user: str,
        password: str,
        *,
        offered: Sequence[str] = (SCRAM_SHA_256,),
        channel_binding: bytes | None = None,
    ) -> None:
        if channel_binding is not None and SCRAM_SHA_256_PLUS in offered:
            self.mechanism = SCRAM_SHA_256_PLUS
            self._header = b"p=" + BINDING_TYPE + b",,"
            self._binding_input = self._header + channel_binding
        elif SCRAM_SHA_256 in offered:
            self.mechanism = SCRAM_SHA_256
            # "y" tells a server that does offer it that somebody removed it.
            self._header = b"n,," if channel_binding is None else b"y,,"
            self._binding_input = self._header
        else:
            raise ProtocolViolation("no common SASL mechanism", by="server")
        name = user.replace("=", "=3D").replace(",", "=2C")
        self._password = password
        self._nonce = _fresh_nonce()
        self._bare = b"n=%b,r=%b" % (
            name.encode("utf-8", "surrogateescape"),
            self._nonce,
        )
        self._signature = b""  # what the server must prove; set by `final`

    def first(self) -> bytes:
        """Return client-first-message."""
        return self._header + self._bare

    def challenge(self, server_first: bytes) -> tuple[bytes, int]:
        """Return the salt and iteration count to `derive` the keys with."""
        _, salt, iterations = self._read_first(server_first)
        return salt, iterations

    def _read_first(self, server_first: bytes) -> tuple[bytes, bytes, int]:
        _check_length(server_first, by="server")
        nonce, salt_text, count, *_ = _read(server_first, b"rsi", by="server")
        salt = _decode(salt_text, by="server")
        is_ours = nonce.startswith(self._nonce) and len(nonce) > len(self._nonce)
        if not is_ours or not NONCE.fullmatch(nonce):
            raise ProtocolViolation("SCRAM nonce does not match", by="server")
        if not salt or not COUNT.fullmatch(count) or int(count) > MAX_ITERATIONS:
            raise ProtocolViolation("SCRAM salt or count is bad", by="server")
        return nonce, salt, int(count)

    def final(self, server_first: bytes, keys: ScramKeys | None = None) -> bytes:
        """Return client-final-message; without `keys` they are derived here."""
        nonce, salt, iterations = self._read_first(server_first)
        if keys is None:
            keys = derive(self._password, salt, iterations)
        without_proof = b"c=%b,r=%b" % (base64.b64encode(self._binding_input), nonce)
        auth_message = b",".join((self._bare, server_first, without_proof))
        self._signature = _hmac(keys.server_key, auth_message)
        stored_key = _sha256(keys.client_key)
        proof = _xor(keys.client_key, _hmac(stored_key, auth_message))
        return without_proof + b",p=" + base64.b64encode(proof)

    def verify(self, server_final: bytes) -> None:
        """Check that the server knows the password's verifier too."""
        _check_length(server_final, by="server")
        signature, *_ = _read(server_final, b"v", by="server")
        proven = _decode(signature, by="server")
        # Empty before `final`: then nothing can match.
        if not self._signature or not hmac.compare_digest(proven, self._signature):
            raise ProtocolViolation("SCRAM server signature is wrong", by="server")


def _check_length(data: bytes, *, by: str = "client") -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolViolation("SCRAM message is too long", by=by)


def _read(message: bytes, names: bytes, *, by: str = "client") -> list[bytes]:
    """Return the values of the attributes `names`, which must come first.

    What follows them may be extensions that need not be understood; `m=`, one
    that must be (RFC 5802, section 5.1), is refused wherever it stands.
    """
    if not ATTRIBUTES.fullmatch(message):
        raise ProtocolViolation("SCRAM attribute is malformed", by=by)
    parts = message.split(b",", len(names))[: len(names)]
    if len(parts) < len(names):
        raise ProtocolViolation("SCRAM attribute is missing", by=by)
    for part, name in zip(parts, names, strict=True):
        if part[0] != name:
            raise ProtocolViolation("SCRAM attribute is out of place", by=by)
    return [part[2:] for part in parts]


def _decode(text: bytes, *, by: str = "client") -> bytes:
    """Decode base64 that has only one spelling: no white space, no spare bits."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise ProtocolViolation("SCRAM base64 is malformed", by=by) from None
    if base64.b64encode(data) != text:
        raise ProtocolViolation("SCRAM base64 is malformed", by=by)
    return data


def _fresh_nonce() -> bytes:
    return base64.b64encode(secrets.token_bytes(NONCE_BYTES))


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a) ^ int.from_bytes(b)).to_bytes(HASH_BYTES)
