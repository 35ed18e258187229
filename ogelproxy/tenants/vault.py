"""Vault: connection strings at rest, encrypted with keys that can be rotated.

And what proxies leave for each other elsewhere, which only they can read. It knows
keys and tokens only; where tokens are stored is `store`'s and `cache`'s business.
Tokens are Fernet's (AES-128-CBC with HMAC-SHA-256, github.com/fernet/spec).
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, SecretUnreadable

MIN_PASSPHRASE_CHARACTERS = 16

#: Every instance must derive the same key from a passphrase, so the salt is fixed;
#: changing it or the cost makes all stored tokens unreadable.
_SALT = b"ogelproxy.vault.1"
#: Sets the key of `seal` apart from those it is made of.
_SHARED = b"ogelproxy.sealed.1"
#: 16 MiB and some 50 ms per passphrase, once per process (RFC 7914, section 2).
_COST = 2**14


class Vault:
    """Encrypt and decrypt connection strings.

    `secret_key` holds one or more keys, comma-separated: the first encrypts, all
    decrypt. Each is a Fernet key (32 bytes as URL-safe base64) or a passphrase of
    at least 16 characters. Raises ConfigInvalid, without the key's text.
    """

    def __init__(self, secret_key: Secret) -> None:
        parts = [part.strip() for part in secret_key.get_secret_value().split(",")]
        keys = [_key(part, position) for position, part in enumerate(parts, 1)]
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(k)) for k in keys])
        shared = hashlib.sha256(_SHARED + b"".join(keys)).digest()
        self._shared = Fernet(base64.urlsafe_b64encode(shared))

    def __repr__(self) -> str:
        return "Vault(**********)"

    def encrypt(self, secret: Secret) -> str:
        """Return a token, different at every call, that `decrypt` reads."""
        return self._fernet.encrypt(secret.get_secret_value().encode()).decode()

    def decrypt(self, token: str) -> Secret:
        """Return what was encrypted; raises SecretUnreadable if no key fits."""
        try:
            return Secret(self._fernet.decrypt(token).decode())
        except (InvalidToken, ValueError):  # the latter for what isn't ASCII
            raise SecretUnreadable() from None

    def rotate(self, token: str) -> str:
        """Encrypt anew with the first key; raises SecretUnreadable if no key fits."""
        try:
            return self._fernet.rotate(token).decode()
        except (InvalidToken, ValueError):  # the latter for what isn't ASCII
            raise SecretUnreadable() from None

    def seal(self, content: bytes) -> bytes:
        """Return a token that only vaults with all the same keys `unseal`.

        One that lacks a key may not even share what it read: a database whose
        connection string it can't decrypt is missing there.
        """
        return self._shared.encrypt(content)

    def unseal(self, token: bytes) -> bytes:
        """Return what was sealed; raises SecretUnreadable if the keys differ."""
        try:
            return self._shared.decrypt(token)
        except InvalidToken:
            raise SecretUnreadable() from None


def _key(key: str, position: int) -> bytes:
    try:
        decoded = base64.b64decode(key, altchars=b"-_", validate=True)
        if len(decoded) == 32:
            return decoded
    except (binascii.Error, ValueError):
        pass
    if len(key) < MIN_PASSPHRASE_CHARACTERS:
        raise ConfigInvalid(
            f"control.secret_key: key {position} is neither a Fernet key nor "
            f"a passphrase of at least {MIN_PASSPHRASE_CHARACTERS} characters"
        )
    return Scrypt(salt=_SALT, length=32, n=_COST, r=8, p=1).derive(key.encode())
