"""The first packets of a connection, up to who it is."""

from __future__ import annotations

import struct

from ogelproxy.errors import NotSupported, ProtocolViolation
from ogelproxy.protocol import messages, startup
from tests.fuzz.targets import Target

PARAMETERS = {
    "user": "org_a",
    "database": "app",
    "options": r"-c search_path=a\ b --work-mem=1MB -cogel.auth=jwt",
    "application_name": "\u00e9",
    "_pq_.command": "1",
    "replication": "database",
}
SSL = struct.pack(">ii", 8, startup.SSL_REQUEST)
SEEDS = (
    messages.startup({"user": "a"}),
    messages.startup(PARAMETERS),
    SSL + messages.startup({"user": "org_b", "DateStyle": "ISO"}),
    struct.pack(">ii", 8, startup.GSSENC_REQUEST)
    + SSL
    + messages.startup({"user": ""}),
    messages.cancel_request(7, b"four"),
    messages.cancel_request(7, bytes(256)),
    struct.pack(">ii", 8, 3 << 16 | 2),
    struct.pack(">ii", 9, 2 << 16) + b"\0",
)
WORDS = (
    *(b"user\0", b"database\0", b"options\0", b"-c ", b"--", b"=", b"\\", b"\0\0"),
    *(b"\0\3\0\0", b"\0\3\0\2", SSL[4:], b"\4\322\26\60", b"_pq_.", b"\xc2\xa0"),
)


def run(data: bytes) -> None:
    """Read packets as a login does, until one says who is there."""
    at = 0
    while len(data) - at >= 4:
        try:
            size = startup.packet_size(data[at : at + 4])
            assert 8 <= size <= startup.MAX_STARTUP_BYTES
            packet = data[at : at + size]
            if len(packet) < size:
                return
            found = startup.parse(packet)
        except (ProtocolViolation, NotSupported) as error:
            assert error.kind == "client" and len(error.client_text) < 20_000
            return
        at += size
        if isinstance(found, startup.CancelRequest):
            assert 4 <= len(found.secret) <= 256
            return
        if isinstance(found, startup.Startup):
            check(found, packet)
            return


def check(found: startup.Startup, packet: bytes) -> None:
    """What was read is all in the packet, and can be sent on to a server."""
    assert found.user and found.database
    texts = [found.user, found.replication, *found.unknown_options]
    for name, value in found.settings.items():
        assert name == name.lower()
        texts += [name, value]
    for text in texts:
        assert "\0" not in text
        # Letter case may change the length of a letter, never to more than twice.
        assert len(text.encode("utf-8", "surrogateescape")) <= 3 * len(packet)
    settings = {
        name: value
        for name, value in found.settings.items()
        if name not in startup.IDENTITY and not name.startswith("_pq_.")
    }
    again = startup.parse(messages.startup({"user": found.user, **settings}))
    assert isinstance(again, startup.Startup) and again.settings == settings
    for word in startup.split_options(" ".join(texts)):
        escaped = "".join(f"\\{letter}" for letter in word)
        assert startup.split_options(f" {escaped}\t") == ([word] if word else [])


TARGETS = (Target("startup", run, SEEDS, WORDS),)
