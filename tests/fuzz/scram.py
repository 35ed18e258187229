"""SCRAM, both sides: only a right proof is ever taken for one.

An input is the exchange's messages, a line each, behind a line of choices. The
nonces are fixed, so that an input means the same each time; `@` in a message
stands for what only the other side could have known: its nonce, its proof.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from unittest.mock import patch
from uuid import UUID

from ogelproxy.auth import scram
from ogelproxy.errors import CredentialRejected, ProtocolViolation
from ogelproxy.tenants.model import KeyVerifier
from tests.fuzz.targets import Target

NONCE = b"fyko+d2lbbFgONRv9qkxdawL"
SALT = b"sixteen bytes ok"
ITERATIONS = 2
PASSWORD = "pencil"
END_POINT = hashlib.sha256(b"certificate").digest()

SALTED = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), SALT, ITERATIONS)
CLIENT_KEY = hmac.digest(SALTED, b"Client Key", "sha256")
STORED_KEY = hashlib.sha256(CLIENT_KEY).digest()
SERVER_KEY = hmac.digest(SALTED, b"Server Key", "sha256")
KEYS = (
    KeyVerifier(UUID(int=1), "other", bytes(32), bytes(32)),
    KeyVerifier(UUID(int=2), "right", STORED_KEY, SERVER_KEY),
)


def proof(auth_message: bytes) -> bytes:
    """ClientProof of RFC 5802, section 3."""
    signature = hmac.digest(STORED_KEY, auth_message, "sha256")
    mixed = bytes(a ^ b for a, b in zip(CLIENT_KEY, signature, strict=True))
    return base64.b64encode(mixed)


def run_server(data: bytes) -> None:
    choices, mechanism, first, final, *_ = [*data.split(b"\n", 3), b"", b"", b"", b""]
    is_bound = b"b" in choices
    keys = KEYS if b"k" in choices else ()
    with patch.object(scram, "_fresh_nonce", lambda: NONCE):
        server = scram.ScramServer(
            keys, SALT, ITERATIONS, channel_binding=END_POINT if is_bound else None
        )
        try:
            answer = server.first(mechanism.decode("latin-1"), first)
        except ProtocolViolation as error:
            assert error.by == "client"
            return
    assert len(answer) <= 2 * scram.MAX_MESSAGE_BYTES
    nonce = answer[2 : answer.index(b",")]
    without_proof, _, given = final.rpartition(b",p=")
    without_proof = without_proof.replace(b"@", nonce)
    bare = first.split(b",", 2)[2]
    right = proof(b",".join((bare, answer, without_proof)))
    given = given.replace(b"@", right)
    try:
        end, key = server.final(without_proof + b",p=" + given)
    except CredentialRejected:
        return
    except ProtocolViolation as error:
        assert error.by == "client"
        return
    assert key is KEYS[1] and keys and given == right
    assert end.startswith(b"v=")
    # Bound to our certificate, or bound to none where nobody could bind.
    binding = base64.b64decode(without_proof[2:].split(b",")[0])
    if mechanism.endswith(b"-PLUS"):
        assert is_bound and binding == b"p=tls-server-end-point,," + END_POINT
    else:
        assert binding == b"n,," or (binding == b"y,," and not is_bound)


def run_client(data: bytes) -> None:
    choices, first, final, *_ = [*data.split(b"\n", 2), b"", b"", b""]
    offered = [scram.SCRAM_SHA_256] * (b"s" in choices)
    offered += [scram.SCRAM_SHA_256_PLUS] * (b"p" in choices)
    try:
        with patch.object(scram, "_fresh_nonce", lambda: NONCE):
            client = scram.ScramClient(
                choices.decode("latin-1"),
                PASSWORD,
                offered=offered,
                channel_binding=END_POINT if b"b" in choices else None,
            )
        opening = client.first()
        first = first.replace(b"@", NONCE)
        salt, iterations = client.challenge(first)
        assert salt and 1 <= iterations <= scram.MAX_ITERATIONS
        # Hours of stretching are bounded by the challenge; a fuzzer has seconds.
        keys = scram.derive(PASSWORD, salt, min(iterations, 2))
        answer = client.final(first, keys)
        assert len(answer) <= 2 * scram.MAX_MESSAGE_BYTES
        bare = opening.split(b",", 2)[2]
        auth_message = b",".join((bare, first, answer.rpartition(b",p=")[0]))
        right = base64.b64encode(hmac.digest(keys.server_key, auth_message, "sha256"))
        final = final.replace(b"@", right)
        client.verify(final)
    except ProtocolViolation as error:
        assert error.by == "server"
        return
    assert final.split(b",")[0] == b"v=" + right


SERVER_SEEDS = (
    b"k\nSCRAM-SHA-256\nn,,n=user,r=rOprNGfwEbeRWgbNEkqO\nc=biws,r=@,p=@",
    b"kb\nSCRAM-SHA-256-PLUS\np=tls-server-end-point,,n=,r=abc\nc="
    + base64.b64encode(b"p=tls-server-end-point,," + END_POINT)
    + b",r=@,p=@",
    b"kb\nSCRAM-SHA-256\ny,,n=,r=abc\nc=eSws,r=@,p=@",
    b"\nSCRAM-SHA-256\nn,,n=,r=a\nc=biws,r=@,p=" + base64.b64encode(bytes(32)),
    b"k\nSCRAM-SHA-256\ny,,n=,r=a,x=y\nc=eSws,r=@,x=y,p=@",
    b"k\nSCRAM-SHA-256\nn,a=me,n=,r=a\n",
)
CLIENT_SEEDS = (
    b"s\nr=@3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096\nv=@",
    b"spb\nr=@+,s=QQ==,i=1\nv=@",
    b"sb\nr=@+,s=QQ==,i=9999999999,x=1\nv=QQ==",
    b"s\nr=@+,s=QQ==,i=1\ne=other-error",
    b"p\n",
)
WORDS = (
    *(b"@", b"\n", b",", b"=", b"n,,", b"y,,", b"p=tls-server-end-point,,", b"c=biws"),
    *(b",r=", b",p=", b"m=", b"s=", b",i=", b"v=", b"SCRAM-SHA-256", b"-PLUS", b"=="),
)
TARGETS = (
    Target("scram-server", run_server, SERVER_SEEDS, WORDS),
    Target("scram-client", run_client, CLIENT_SEEDS, WORDS),
)
