"""Vault: connection strings at rest, encrypted with keys that can be rotated.

It knows keys and tokens only; where tokens are stored is `store`'s business.
Tokens are Fernet's (AES-128-CBC with HMAC-SHA-256, github.com/fernet/spec).
"""

from __future__ import annotations

import base64
import binascii

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ogelproxy.config import Secret
from ogelproxy.errors import ConfigInvalid, SecretUnreadable

MIN_PASSPHRASE_CHARACTERS = 16

#: Every instance must derive the same key from a passphrase, so the salt is fixed;
#: changing it or the cost makes all stored tokens unreadable.
_SALT = b"ogelproxy.vault.1"
#: 16 MiB and some 50 ms per passphrase, once per process (RFC 7914, section 2).
_COST = 2**14


class Vault:
    """Encrypt and decrypt connection strings.

    `secret_key` holds one or more keys, comma-separated: the first encrypts, all
    decrypt. Each is a Fernet key (32 bytes as URL-safe base64) or a passphrase of
    at least 16 characters. Raises ConfigInvalid, without the key's text.
    """

    def __init__(self, secret_key: Secret) -> None:
        keys = [part.strip() for part in secret_key.get_secret_value().split(",")]
        self._fernet = MultiFernet(
            [_fernet(key, position) for position, key in enumerate(keys, 1)]
        )

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


def _fernet(key: str, position: int) -> Fernet:
    try:
        if len(base64.b64decode(key, altchars=b"-_", validate=True)) == 32:
            return Fernet(key)
    except (binascii.Error, ValueError):
        pass
    if len(key) < MIN_PASSPHRASE_CHARACTERS:
        raise ConfigInvalid(
            f"control.secret_key: key {position} is neither a Fernet key nor "
            f"a passphrase of at least {MIN_PASSPHRASE_CHARACTERS} characters"
        )
    derived = Scrypt(salt=_SALT, length=32, n=_COST, r=8, p=1).derive(key.encode())
    return Fernet(base64.urlsafe_b64encode(derived))
