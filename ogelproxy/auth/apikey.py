"""The form of an API key: ``ogk_`` and 32 letters or digits.

Makes keys and tells what may be shown of one. A key itself is kept nowhere:
`scram.make_verifier` makes of it what the control plane stores.
"""

from __future__ import annotations

import re
import secrets
import string

from ogelproxy.errors import CredentialRejected

#: Letters and digits only: a key needs no escaping in a URL, shell or SQL.
ALPHABET = string.ascii_letters + string.digits
#: 32 of 62 characters are 190 bits.
SECRET_CHARACTERS = 32
#: Of the secret, characters that may be shown; 154 bits stay hidden.
SHOWN_CHARACTERS = 6

MARK = "ogk_"
FORM = re.compile(rf"{MARK}[A-Za-z0-9]{{{SECRET_CHARACTERS}}}")


def generate() -> str:
    """Return a new key."""
    return MARK + "".join(secrets.choice(ALPHABET) for _ in range(SECRET_CHARACTERS))


def is_well_formed(text: str) -> bool:
    """Whether `text` could be a key of ours."""
    return FORM.fullmatch(text) is not None


def prefix(key: str) -> str:
    """Return the part of a key by which people may tell it from others.

    Raises CredentialRejected when it isn't one: of some other secret the first
    characters may be all there is.
    """
    if not is_well_formed(key):
        raise CredentialRejected("not an API key")
    return key[: len(MARK) + SHOWN_CHARACTERS]
