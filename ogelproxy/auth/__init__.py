"""Who is this? Authenticator picks the method and answers with a Credential.

An Exchange reads and makes the bodies of Authentication messages (Postgres
manual, 55.2.1 and 55.3) and knows no socket. Whether an unknown organisation
asks, or a known one with a wrong key, can't be told from outside. What a
credential may do, and whether its tenant is suspended, is not asked here.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

from ogelproxy.auth import scram
from ogelproxy.auth.budget import FailureBudget
from ogelproxy.auth.jwt import TokenVerifier
from ogelproxy.auth.scram import ScramServer
from ogelproxy.config import Auth
from ogelproxy.errors import CredentialRejected, ProtocolViolation, TokenRequiresTLS
from ogelproxy.tenants.model import HANDLE, OPERATORS, Credential, Tenant

TOKEN_SUFFIX = ".jwt"

#: Codes of Authentication messages (manual 55.7).
CLEARTEXT_PASSWORD = (3).to_bytes(4, "big")
SASL = (10).to_bytes(4, "big")
SASL_CONTINUE = (11).to_bytes(4, "big")
SASL_FINAL = (12).to_bytes(4, "big")

#: Length of an initial response that isn't there (manual 55.7).
NO_RESPONSE = 0xFFFF_FFFF


class Exchange(abc.ABC):
    """One login: bodies of messages in, bodies of messages out."""

    #: Who it is; None until the exchange has ended well.
    credential: Credential | None = None

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    @abc.abstractmethod
    def start(self) -> bytes:
        """Return the body of the first Authentication message."""

    async def step(self, body: bytes) -> list[bytes]:
        """Take the body of a client's `p` message, return bodies to send.

        Raises CredentialRejected, LoginThrottled, ProtocolViolation, and
        ControlUnavailable when a token's key can't be had. After an error the
        exchange is over.
        """
        # Checked here too: many exchanges may have begun before the first failed.
        self._attempts.check()
        try:
            return await self._answer(body)
        except CredentialRejected:
            self._attempts.record()
            raise

    @abc.abstractmethod
    async def _answer(self, body: bytes) -> list[bytes]: ...


class Attempts:
    """The failure budget as one exchange sees it."""

    def __init__(
        self,
        budget: FailureBudget,
        handle: str,
        source: str,
        clock: Callable[[], float],
    ) -> None:
        self._budget = budget
        self._handle = handle
        self._source = source
        self._clock = clock

    def check(self) -> None:
        self._budget.check(self._handle, self._source, self._clock())

    def record(self) -> None:
        self._budget.record(self._handle, self._source, self._clock())


class KeyExchange(Exchange):
    """Log in by API key, with SCRAM."""

    def __init__(self, attempts: Attempts, handle: str, server: ScramServer) -> None:
        super().__init__(attempts)
        self._handle = handle
        self._server = server
        # The message that comes next; "nothing" also while one is being read,
        # so that a nonce serves one guess only.
        self._expected: Literal["initial", "first", "final", "nothing"] = "initial"
        self._mechanism = ""  # the client's choice, from its initial message

    def start(self) -> bytes:
        return _offer(self._server.mechanisms)

    async def _answer(self, body: bytes) -> list[bytes]:
        expected, self._expected = self._expected, "nothing"
        if expected == "nothing":
            raise ProtocolViolation("the login is over")
        if expected == "final":
            answer, key = self._server.final(body)
            self.credential = Credential(self._handle, key_id=key.id)
            return [SASL_FINAL + answer]
        data: bytes | None = body
        if expected == "initial":
            data = self._read_initial(body)
        if data is None:
            # RFC 4422, section 3: an empty challenge asks for the response.
            self._expected = "first"
            return [SASL_CONTINUE]
        answer = self._server.first(self._mechanism, data)
        self._expected = "final"
        return [SASL_CONTINUE + answer]

    def _read_initial(self, body: bytes) -> bytes | None:
        """Read a SASLInitialResponse; None when it has no response in it."""
        name, _, rest = body.partition(b"\0")
        size, data = int.from_bytes(rest[:4], "big"), rest[4:]
        if len(rest) < 4 or len(data) != (0 if size == NO_RESPONSE else size):
            raise ProtocolViolation("SASLInitialResponse is malformed")
        self._mechanism = name.decode("ascii", "replace")
        if self._mechanism not in self._server.mechanisms:
            raise ProtocolViolation("SASL mechanism was not offered")
        return None if size == NO_RESPONSE else data


@cache  # there are two
def _offer(mechanisms: tuple[str, ...]) -> bytes:
    return SASL + b"".join(name.encode() + b"\0" for name in mechanisms) + b"\0"


class TokenExchange(Exchange):
    """Log in by a token sent as the password."""

    def __init__(
        self,
        attempts: Attempts,
        handle: str,
        verifier: TokenVerifier,
        *,
        is_known: bool,
    ) -> None:
        super().__init__(attempts)
        self._handle = handle
        self._verifier = verifier
        self._is_known = is_known
        self._is_over = False

    def start(self) -> bytes:
        return CLEARTEXT_PASSWORD

    async def _answer(self, body: bytes) -> list[bytes]:
        if self._is_over:
            raise ProtocolViolation("the login is over")
        self._is_over = True
        if body.count(b"\0") != 1 or not body.endswith(b"\0"):
            raise ProtocolViolation("PasswordMessage is malformed")
        try:
            token = body[:-1].decode("ascii")
        except UnicodeDecodeError:
            raise CredentialRejected("token is not ASCII") from None
        credential = await self._verifier.verify(token, self._handle)
        if not self._is_known:
            raise CredentialRejected("token of an organisation that doesn't exist")
        self.credential = credential
        return []


class Authenticator:
    """Begin the exchange that fits a client, and remember who failed.

    `mock_secret` makes the salts of unknown organisations: the same in all
    processes and for as long as it may be, and known to nobody.
    """

    def __init__(
        self,
        config: Auth,
        *,
        mock_secret: bytes,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigInvalid when the token secret is too short."""
        self._mock_secret = mock_secret
        self._clock = clock
        self._budget = FailureBudget(config.max_failures, config.failure_interval)
        self._verifier = TokenVerifier(config, clock=clock, wall_clock=wall_clock)

    @staticmethod
    def split_user(user: str) -> tuple[str, bool]:
        """Read ``org_abc`` or ``org_abc.jwt``: the handle, and whether by token.

        Raises CredentialRejected for a name that no organisation can have.
        """
        handle = user.removesuffix(TOKEN_SUFFIX)
        if handle != OPERATORS and not HANDLE.fullmatch(handle):
            raise CredentialRejected("user is not an organisation's handle")
        return handle, handle != user

    def begin(
        self,
        tenant: Tenant | None,
        handle: str,
        *,
        is_token: bool,
        is_private: bool,
        source: str,
        channel_binding: bytes | None,
    ) -> Exchange:
        """Return the exchange for one login.

        `tenant` is None when there is no such organisation; `is_private` is
        whether nobody can listen (TLS, loopback, Unix socket); `source` is the
        client's IP address, empty for a Unix socket; `channel_binding` is our
        certificate's hash (RFC 5929, section 4.1), None without TLS.
        Raises TokenRequiresTLS, LoginThrottled, and CredentialRejected for a token
        of operators: whoever issues tokens vouches for tenants only.
        """
        attempts = Attempts(self._budget, handle, source, self._clock)
        attempts.check()
        if is_token:
            if handle == OPERATORS:
                raise CredentialRejected("operators log in by key")
            if not is_private:
                raise TokenRequiresTLS()
            return TokenExchange(
                attempts, handle, self._verifier, is_known=tenant is not None
            )
        # Made for known organisations too, so that both take as long.
        salt = scram.mock_salt(handle, self._mock_secret)
        server = (
            ScramServer((), salt, scram.ITERATIONS, channel_binding=channel_binding)
            if tenant is None
            else ScramServer(
                tenant.keys,
                tenant.salt,
                tenant.iterations,
                channel_binding=channel_binding,
            )
        )
        return KeyExchange(attempts, handle, server)
