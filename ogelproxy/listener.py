"""Listener: sockets that clients connect to, their TLS, and accepting.

Accepting stops while as many clients log in, or are connected, as may be: the
kernel's queue then holds the others.
"""

from __future__ import annotations

import logging
import socket
import ssl

from cryptography import x509

from ogelproxy._accept import accept
from ogelproxy.auth.certificate import end_point
from ogelproxy.client import Client
from ogelproxy.config import Config, Listen
from ogelproxy.config import Tls as TlsConfig
from ogelproxy.errors import ConfigInvalid
from ogelproxy.login import Login, Tls
from ogelproxy.protocol import hello
from ogelproxy.relay import Relay

log = logging.getLogger(__name__)

#: Clients accepted in one go before others get their turn.
ACCEPTED_AT_ONCE = 64

#: Seconds until accepting is tried again after the process ran out of something.
PAUSE = 0.1


class Listener:
    """The listening sockets of one engine."""

    def __init__(self, config: Config, login: Login, relay: Relay) -> None:
        self._config = config
        self._login = login
        self._relay = relay
        self._sockets: list[socket.socket] = []
        self.login_count = 0  # clients that log in
        self._is_full = False

    @property
    def address(self) -> tuple[str, int] | None:
        if not self._sockets:
            return None
        host, port = self._sockets[0].getsockname()[:2]
        return host, port

    def open(self, given: socket.socket | None = None) -> None:
        """Accept on `given`, which listens already, or bind and listen.

        Raises OSError naming the settings that failed.
        """
        sock = given or bind(self._config.listen)
        # On Linux what is accepted has them from here: two calls fewer per client.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sockets.append(sock)
        self._watch()

    def close(self) -> None:
        loop = self._relay.reactor.loop
        for sock in self._sockets:
            loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _watch(self) -> None:
        for sock in self._sockets:
            self._relay.reactor.loop.add_reader(sock, self._accept, sock)

    def _pause(self) -> None:
        loop = self._relay.reactor.loop
        for sock in self._sockets:
            loop.remove_reader(sock)
        loop.call_later(PAUSE, self._watch)

    @property
    def _has_room(self) -> bool:
        listen = self._config.listen
        clients = self._relay.client_count + self.login_count
        return self.login_count < listen.max_logins and clients < listen.max_clients

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._has_room:
                if not self._is_full:
                    log.warning("accepting no more clients for now")
                self._is_full = True
                self._pause()
                return
            self._is_full = False
            try:
                accepted = accept(sock.fileno())
            except OSError as error:
                # Out of descriptors or memory: they come back when clients go.
                log.error("accept failed: %s", error)
                self._pause()
                return
            if accepted is None:
                return
            fd, address, client_port = accepted
            client = Client(self._relay.reactor, fd)
            client.address = address.removeprefix("::ffff:")
            client.port = client_port
            self.login_count += 1
            self._login.begin(client, self._login_ended)

    def _login_ended(self) -> None:
        self.login_count -= 1


def bind(listen: Listen, *, is_shared: bool = False) -> socket.socket:
    """Return a socket that listens; if `is_shared`, others may on the same port.

    The kernel spreads connections over those that share. Raises OSError naming the
    settings that failed.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((listen.host, listen.port))
        sock.listen(listen.backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        where = f"listen.host {listen.host}, listen.port {listen.port}"
        raise OSError(error.errno, f"{where}: {error.strerror}") from error
    return sock


def bind_shared(listen: Listen, count: int) -> list[socket.socket]:
    """Return `count` sockets that share one port. Raises OSError as `bind`."""
    # Who shares can't tell a port of its own from another proxy's: ask without
    # sharing first. That also chooses the port, if it is free to be chosen.
    with bind(listen) as probe:
        port = probe.getsockname()[1]
    chosen = listen.model_copy(update={"port": port})
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(bind(chosen, is_shared=True))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def load_tls(config: TlsConfig) -> Tls | None:
    """Read certificate and key. Raises ConfigInvalid naming what is wrong."""
    asks = config.client_certificates != "off"
    if asks and (config.client_ca is None or config.cert is None):
        raise ConfigInvalid("tls.client_certificates needs tls.client_ca and tls.cert")
    if config.cert is None and config.key is None:
        return None
    if config.cert is None or config.key is None:
        raise ConfigInvalid("tls.cert and tls.key are needed together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Sessions may be taken up again. Python keeps the keys of tickets in the context:
    # another worker's can't be read, nor those from before a reload.
    context.num_tickets = 1
    context.set_alpn_protocols([hello.POSTGRESQL.decode()])
    try:
        context.load_cert_chain(config.cert, config.key)
        certificate = x509.load_pem_x509_certificate(config.cert.read_bytes())
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigInvalid(f"tls.cert, tls.key: {error}") from error
    if asks:
        # A client without one is told so in words, after its first packet.
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigInvalid(f"tls.client_ca: {error}") from error
    return Tls(context, end_point(certificate))
