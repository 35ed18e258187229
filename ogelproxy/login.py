"""Login: from the first packet to ReadyForQuery, layers 1, 2, 3 and 5.

One coroutine per client that ends when the client is ready. In this order, so
that nothing is spent on a stranger: who is it, is the organisation allowed in,
does the database exist, is there room, and only then a server.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING
from uuid import UUID

from ogelproxy import replication
from ogelproxy._pool import Settings
from ogelproxy.auth import Authenticator
from ogelproxy.auth.certificate import organizations
from ogelproxy.client import Client, Session
from ogelproxy.config import Config
from ogelproxy.console.operator import DATABASES, OperatorConsole
from ogelproxy.errors import (
    CertificateRejected,
    CredentialRejected,
    DatabaseUnknown,
    InternalError,
    LoginTimeout,
    OgelError,
    ProtocolViolation,
    TenantSuspended,
    TLSRequired,
    TooManyConnections,
)
from ogelproxy.protocol import forwarding, hello, messages, startup
from ogelproxy.replication import ReplicationPool
from ogelproxy.steps import Steps, in_task
from ogelproxy.tenants.directory import Directory
from ogelproxy.tenants.model import OPERATORS, Credential, Target, Tenant
from ogelproxy.tenants.supplied import InMemoryDirectory

if TYPE_CHECKING:
    from ogelproxy.flights import FlightBook
    from ogelproxy.gate import Admission, Gate
    from ogelproxy.limiter import Limiter
    from ogelproxy.metrics import Metrics
    from ogelproxy.pool import Pool
    from ogelproxy.relay import Relay, Tenants
    from ogelproxy.router import Router
    from ogelproxy.traffic import TrafficBook
    from ogelproxy.usage import Meter
    from ogelproxy.usage.journal import Journal

log = logging.getLogger(__name__)

#: Start-up setting that asks for token login beside the user's `.jwt` suffix.
AUTH_SETTING = "ogel.auth"


@dataclass(frozen=True, slots=True)
class Tls:
    """A TLS context for clients and its tls-server-end-point (RFC 5929)."""

    context: ssl.SSLContext
    end_point: bytes


@dataclass(slots=True)
class _Guest:
    """A client that has proven who it is, and is not let in yet."""

    client: Client
    packet: startup.Startup
    credential: Credential
    #: The end of the proof, until it is sent: with what comes next, if that is soon.
    answer: bytes = field(repr=False)

    def send_answer(self) -> None:
        self.client.send(self.take_answer())

    def take_answer(self) -> bytes:
        answer, self.answer = self.answer, b""
        return answer


class Login:
    """The logins of one engine."""

    def __init__(
        self,
        config: Config,
        *,
        relay: Relay,
        tenants: Tenants,
        authenticator: Authenticator,
        gate: Gate,
        limiter: Limiter,
        flights: FlightBook,
        router: Router,
        meter: Meter,
        metrics: Metrics,
        traffic: TrafficBook,
        console: OperatorConsole,
        journal: Journal,
    ) -> None:
        self.config = config
        self.tls: Tls | None = None  # replaced at a reload
        # When keys were used since the engine last took this.
        self.key_uses: dict[UUID, datetime] = {}
        self._relay = relay
        self._tenants = tenants
        # An embedder's own may wait for its records in any way.
        self._needs_task = not isinstance(tenants, Directory | InMemoryDirectory)
        self._authenticator = authenticator
        self._gate = gate
        self._limiter = limiter
        self._flights = flights
        self._router = router
        self._meter = meter
        self._metrics = metrics
        self._traffic = traffic
        self._console = console
        self._journal = journal

    def begin(self, client: Client, ended: Callable[[], None]) -> None:
        """Log a client in, or tell it why not; `ended` is called after that."""
        steps = Steps(client, self._relay.begin, ended)
        steps.start(self._run(client, steps), self.config.listen.login_timeout)

    async def _run(self, client: Client, steps: Steps) -> None:
        try:
            await self._log_in(client, steps)
        except asyncio.CancelledError:
            if not steps.is_late:
                client.close()
                raise
            await self._refuse(client, LoginTimeout())
        except OgelError as error:
            await self._refuse(client, error)
        except ssl.SSLError as error:
            log.info("TLS failed: %s", error, extra={"client": client.address})
            await self._part(client)
        except OSError as error:
            log.debug("client left its login: %s", error)
            client.close()
        except Exception as defect:
            internal = InternalError(f"{type(defect).__name__}: {defect}")
            log.error("%s", internal, exc_info=defect)
            await self._refuse(client, internal)
        except BaseException:
            client.close()
            raise

    async def _refuse(self, client: Client, error: OgelError) -> None:
        if client.is_closed or not client.is_logging_in:
            return
        self._metrics.refused(error)
        log.info("login refused: %s", error, extra={"client": client.address})
        await self._part(client, messages.error_response(error, is_fatal=True))

    async def _part(self, client: Client, last: bytes = b"") -> None:
        """Send what the client should still read, and close."""
        await in_task()
        client.send(last)
        try:
            # Closing with bytes unread would reset the connection, and what was
            # sent with it: wait for the client to close first.
            async with asyncio.timeout(2.0):
                await client.drained()
                client.end_output()
                while True:
                    await client.more()
                    client.take(len(client.peek()))
        except (OSError, TimeoutError):
            pass
        finally:
            client.close()

    async def _log_in(self, client: Client, steps: Steps) -> None:
        packet = await self._first_packet(client)
        if packet is None:
            client.close()
            return
        guest = await self._authenticate(client, packet)
        steps.before_task(guest.send_answer)
        try:
            await self._receive(guest)
        except OgelError:
            guest.send_answer()
            raise

    async def _receive(self, guest: _Guest) -> None:
        """Let a client in whose proof was good, if it may."""
        credential, database = guest.credential, guest.packet.database
        if credential.handle == OPERATORS:
            if database not in DATABASES:
                raise DatabaseUnknown(database)
            # The console is told of changes from now on; one may have been before.
            operators = await self._tenants.find(OPERATORS)
            if operators is None or not _has_key(operators, credential):
                raise CredentialRejected("the key was revoked during the login")
            guest.send_answer()
            self._console.enter(guest.client, credential)
            return
        tenant = await self._tenants.find(credential.handle)
        if tenant is not None and database not in tenant.databases:
            # It may have been made a moment ago.
            tenant = await self._tenants.refresh(credential.handle)
        if tenant is None or tenant.is_suspended:
            raise TenantSuspended()
        # What is known of it from here on is news, and nothing is none.
        self._tenants.hold(tenant.handle)
        try:
            await self._let_in(guest, tenant)
        finally:
            self._tenants.release(tenant.handle)

    async def _let_in(self, guest: _Guest, tenant: Tenant) -> None:
        target = self._router.route(tenant, guest.packet.database)
        admission = await self._admit(tenant)
        try:
            if guest.packet.replication:
                await self._replicate(guest, tenant, target, admission)
                return
            pool = self._router.pool(tenant, target)
            # Connections under way count as clients: the pool must not go.
            settings = await pool.settings(guest.packet.session)
            self._welcome(guest, tenant, admission, pool, settings)
        except BaseException:
            if guest.client.is_logging_in:
                self._gate.leave(admission)
            raise

    async def _admit(self, tenant: Tenant) -> Admission:
        """Ask the gate; what it refuses for its tier is noted."""
        try:
            return await self._gate.admit(tenant)
        except TooManyConnections:
            self._journal.note(
                tenant.id,
                "upgrade_prompt.max_connections",
                tier=tenant.tier.name,
                limit=tenant.max_connections,
            )
            raise

    async def _first_packet(self, client: Client) -> startup.Startup | None:
        """Answer encryption and cancel requests up to a StartupMessage."""
        await self._read_forwarding(client)
        if await self._peek(client) == hello.HANDSHAKE:
            # sslnegotiation=direct (manual 55.2.11).
            if self.tls is None:
                # In no words, as Postgres: what speaks TLS would not understand.
                log.info("no TLS for a client", extra={"client": client.address})
                await self._part(client)
                return None
            await self._start_tls(client, self.tls, is_direct=True)
        asked: set[bool] = set()
        while True:
            head = await client.receive_exactly(4)
            try:
                size = startup.packet_size(head)
            except ProtocolViolation as violation:
                # In no words, as Postgres: it may be a Terminate message.
                log.info("%s", violation, extra={"client": client.address})
                await self._part(client)
                return None
            packet = startup.parse(head + await client.receive_exactly(size - 4))
            if isinstance(packet, startup.CancelRequest):
                await in_task()
                await self._relay.cancels.cancel(packet.process_id, packet.secret)
                return None
            if isinstance(packet, startup.Startup):
                break
            if packet.is_tls in asked or client.tls is not None:
                raise ProtocolViolation("encryption was asked for twice")
            asked.add(packet.is_tls)
            if client.peek():
                # Sent in clear before TLS, it would count as sent inside it.
                raise ProtocolViolation("bytes behind an encryption request")
            if packet.is_tls and self.tls is not None:
                client.send(b"S")
                await self._start_tls(client, self.tls, is_direct=False)
            else:
                client.send(b"N")
        if packet.needs_negotiation:
            client.send(
                messages.negotiate_protocol_version(
                    packet.spoken_minor, packet.unknown_options
                )
            )
        if self.config.tls.is_required and not self._is_private(client):
            raise TLSRequired()
        return packet

    async def _read_forwarding(self, client: Client) -> None:
        """Learn from a load balancer of ours whom it speaks for."""
        networks = self.config.listen.proxy_protocol
        if not networks:
            return
        balancer = ipaddress.ip_address(client.address)
        if not any(balancer in network for network in networks):
            return
        while (header := forwarding.parse(client.peek())) is None:
            await client.more()
        client.take(header.size)
        client.is_forwarded = header.is_forwarded
        client.address = header.source or client.address

    @staticmethod
    async def _peek(client: Client) -> bytes:
        """Wait for the next byte, and leave it where it is."""
        while not (waiting := client.peek()):
            await client.more()
        return waiting[:1]

    async def _start_tls(self, client: Client, tls: Tls, *, is_direct: bool) -> None:
        """Put TLS around a client, if it speaks our protocol inside (RFC 7301).

        Without SSLRequest nothing else shows that it does (manual 55.2.11).
        """
        alert = hello.NO_APPLICATION_PROTOCOL
        try:
            while (offered := hello.protocols(client.peek())) is None:
                await client.more()
            is_ours = hello.POSTGRESQL in offered or not (offered or is_direct)
        except ProtocolViolation:
            alert, is_ours = hello.DECODE_ERROR, False
        if not is_ours:
            await self._part(client, alert)
            raise ConnectionAbortedError("TLS was refused")
        await client.start_tls(tls.context, server_side=True)

    @staticmethod
    def _is_private(client: Client) -> bool:
        """Whether nobody can listen: TLS, a Unix socket, or loopback.

        Between the client and a load balancer anybody may.
        """
        if client.tls is not None or not client.address:
            return True
        return not client.is_forwarded and _is_loopback(client.address)

    def _check_certificate(self, client: Client, handle: str) -> None:
        """Ask that the client's certificate, if it needs one, names `handle`."""
        rule = self.config.tls.client_certificates
        if rule == "off":
            return
        certificate = client.tls.getpeercert() if client.tls is not None else None
        if certificate is None and rule == "allow":
            return
        if client.tls is not None and client.tls.session_reused and certificate:
            # OpenSSL looked at it when the session began.
            expires_at = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
            if expires_at <= time.time():
                raise CertificateRejected("certificate of a TLS session has expired")
        named = organizations(certificate or {})
        if handle not in named:
            raise CertificateRejected(
                f"certificate names {sorted(named)}, not {handle}"
            )

    async def _authenticate(self, client: Client, packet: startup.Startup) -> _Guest:
        if self._needs_task:
            await in_task()
        handle, is_token = self._authenticator.split_user(packet.user)
        is_token = is_token or packet.settings.get(AUTH_SETTING) == "jwt"
        tenant = await self._tenants.find(handle)
        tls = self.tls if client.tls is not None else None
        try:
            self._check_certificate(client, handle)
            exchange = self._authenticator.begin(
                tenant,
                handle,
                is_token=is_token,
                is_private=self._is_private(client),
                source=client.address,
                channel_binding=tls.end_point if tls is not None else None,
            )
            client.send(messages.authentication(exchange.start()))
            if is_token:
                await in_task()  # its key may have to be fetched
            while exchange.credential is None:
                kind, body = await client.receive_message()
                if kind != b"p":
                    raise ProtocolViolation("expected a password message")
                answers = await exchange.step(body)
                answer = b"".join(map(messages.authentication, answers))
                if exchange.credential is None:
                    client.send(answer)
        except OgelError:
            self._metrics.login("rejected")
            raise
        self._metrics.login("accepted")
        if exchange.credential.key_id is not None:
            self.key_uses[exchange.credential.key_id] = datetime.now(UTC)
        return _Guest(client, packet, exchange.credential, answer)

    async def _replicate(
        self, guest: _Guest, tenant: Tenant, target: Target, admission: Admission
    ) -> None:
        """Let a client in that has a server of its own."""
        replication.check(tenant, target)
        pool = ReplicationPool(
            tenant,
            target,
            self.config.pool,
            self._relay,
            parameter=guest.packet.replication,
            wanted=dict(guest.packet.session),
        )
        try:
            settings = await pool.open()
            replication.check(self._tenants.peek(tenant.handle) or tenant, target)
            self._welcome(guest, tenant, admission, pool, settings)
        except BaseException:
            pool.retire_all()
            raise
        self._router.adopt(pool)

    def _welcome(
        self,
        guest: _Guest,
        tenant: Tenant,
        admission: Admission,
        pool: Pool,
        settings: Settings,
    ) -> None:
        client, packet, credential = guest.client, guest.packet, guest.credential
        # The record may have changed while servers were asked: what was
        # decided above must still hold when the client is let in.
        tenant = self._still_welcome(tenant, credential, pool.target)
        if admission.error is not None:
            raise admission.error
        application = packet.settings.get("application_name", "")
        attribution = self._meter.attribution(tenant, pool.target, application)
        if client.is_broken:
            raise ConnectionResetError("the client left during its login")
        process_id, secret = self._relay.cancels.issue(client, packet.spoken_minor)
        client.session = Session(
            handle=tenant.handle,
            key_id=credential.key_id,
            database=packet.database,
            target_id=pool.target.id,
            application_name=application,
            address=client.address,
            protocol=f"3.{packet.spoken_minor}",
            attribution=attribution,
            admission=admission,
            connected_at=datetime.now(UTC),
            is_replication=bool(packet.replication),
            process_id=process_id,
            secret=secret,
        )
        client.send(
            guest.take_answer()
            + messages.AUTHENTICATION_OK
            + (settings.statuses or b"")
            + messages.backend_key_data(process_id, secret)
            + messages.READY_IDLE
        )
        traffic = self._traffic.of(
            pool.target.id, tenant.tier.name, str(pool.target.type)
        )
        traffic.logins += 1
        client.start(
            self._relay,
            pool,
            settings,
            self._limiter.bucket(tenant),
            attribution,
            self._meter.table,
            traffic,
            self._flights.of(tenant),
        )
        self._relay.enter(client)
        admission.on_lost = partial(self._relay.fail, client)

    def _still_welcome(
        self, before: Tenant, credential: Credential, target: Target
    ) -> Tenant:
        tenant = self._tenants.peek(before.handle)
        if tenant is None or tenant.is_suspended:
            raise TenantSuspended()
        if not _has_key(tenant, credential):
            raise TenantSuspended("key was revoked during the login")
        if self._router.route(tenant, target.name) != target:
            raise DatabaseUnknown(target.name)
        return tenant


def _has_key(tenant: Tenant, credential: Credential) -> bool:
    """Whether what was proven by a key, if it was, may still be."""
    if credential.key_id is None:
        return True
    return any(key.id == credential.key_id for key in tenant.keys)


#: Addresses are remembered: programs come from the same few.
@lru_cache(4096)
def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
