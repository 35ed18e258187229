"""Columns of the tables that the operators' console shows.

Their order and types are those of PgBouncer's console (its doc/usage.md and
src/admin.c, 1.25); what PgBouncer has no word for follows at the end.
"""

from __future__ import annotations

from ogelproxy.protocol.rows import Column, Type


def _named(text: str, type: Type = Type.TEXT) -> tuple[Column, ...]:
    return tuple(Column(name, type) for name in text.split())


#: Behind PgBouncer's own columns, where a row is of one database or connection.
TENANT = _named("tenant tier")
#: Behind these, where a row is of one connection: who of several workers has it.
WORKER = _named("worker", Type.INT4)

DATABASES = (
    *_named("name host"),
    *_named("port", Type.INT4),
    *_named("database force_user"),
    *_named("pool_size min_pool_size reserve_pool_size server_lifetime", Type.INT4),
    *_named("pool_mode load_balance_hosts"),
    *_named("max_connections current_connections", Type.INT4),
    *_named("max_client_connections current_client_connections", Type.INT4),
    *_named("paused disabled", Type.INT4),
    *TENANT,
    *_named("circuit"),
)
POOLS = (
    *_named("database user"),
    *_named("cl_active cl_waiting cl_active_cancel_req", Type.INT4),
    *_named("cl_waiting_cancel_req sv_active sv_active_cancel", Type.INT4),
    *_named("sv_being_canceled sv_idle sv_used sv_tested sv_login", Type.INT4),
    *_named("maxwait maxwait_us", Type.INT4),
    *_named("pool_mode load_balance_hosts"),
    *TENANT,
)
SOCKETS = (
    *_named("type user database replication state addr"),
    *_named("port", Type.INT4),
    *_named("local_addr"),
    *_named("local_port", Type.INT4),
    *_named("connect_time request_time"),
    *_named("wait wait_us close_needed", Type.INT4),
    *_named("ptr link"),
    *_named("remote_pid", Type.INT4),
    *_named("tls application_name"),
    *_named("prepared_statements id", Type.INT4),
)
BUFFERS = _named(
    "recv_pos pkt_pos pkt_remain send_pos send_remain pkt_avail send_avail", Type.INT4
)
#: The numbers of `Work`, in its order.
WORK = (
    "server_assignment_count xact_count query_count received sent xact_time query_time "
    "wait_time client_parse_count server_parse_count bind_count client_login_count"
).split()
STATS = (
    Column("database"),
    *(Column(f"total_{name}", Type.NUMERIC) for name in WORK),
    *(Column("avg_" + name.replace("received", "recv"), Type.NUMERIC) for name in WORK),
    *TENANT,
)
STATS_TOTALS = (
    Column("database"),
    *(
        Column(f"bytes_{name}" if name in ("received", "sent") else name, Type.NUMERIC)
        for name in WORK
    ),
    *TENANT,
)
#: As PgBouncer has it: only the later ones say that they are averages.
STATS_AVERAGES = (
    *STATS_TOTALS[:9],
    *(Column(f"avg_{name}", Type.NUMERIC) for name in WORK[8:]),
    *TENANT,
)
#: PgBouncer names these as its source does.
TOTAL_NAMES = [
    {"received": "client_bytes", "sent": "server_bytes"}.get(name, name)
    if not name.endswith(("parse_count", "bind_count"))
    else f"ps_{name}"
    for name in WORK
]
USERS = (
    *_named("name pool_size reserve_pool_size pool_mode"),
    *_named("max_user_connections current_connections", Type.INT4),
    *_named("max_user_client_connections current_client_connections", Type.INT4),
    *_named("tier"),
)
CLIENTS = (*SOCKETS, *TENANT, *_named("pins"), *WORKER)
SERVERS = (*SOCKETS, *TENANT, *WORKER)
ALL_SOCKETS = (*SOCKETS, *BUFFERS, *TENANT, *WORKER)
TOTALS = (*_named("name"), *_named("value", Type.NUMERIC))
LISTS = (*_named("list"), *_named("items", Type.INT4))
CONFIG = _named("key value default changeable")
STATE = _named("key value")
VERSION = _named("version")
PEERS = (
    *_named("peer_id", Type.INT4),
    *_named("host"),
    *_named("port pool_size", Type.INT4),
)
PEER_POOLS = _named(
    "peer_id cl_active_cancel_req cl_waiting_cancel_req sv_active_cancel sv_login",
    Type.INT4,
)
DNS_HOSTS = (*_named("hostname"), *_named("ttl", Type.INT8), *_named("addrs"))
DNS_ZONES = (
    *_named("zonename"),
    *_named("serial", Type.INT8),
    *_named("count", Type.INT4),
)
