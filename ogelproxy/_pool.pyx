"""The part of a pool that every transaction passes: idle servers and waiters.

`pool.Pool` derives from it and does what takes time: opening, retiring,
proving settings. Servers are used last in first out, so that surplus ones fall
idle and are closed; clients wait first in first out.
"""

import asyncio
from collections import deque


# Settings that change nothing about what a statement means or returns, so that a
# prepared one may be shared over their values. Names with a dot are such, too.
cdef frozenset HARMLESS = frozenset((
    "application_name", "client_min_messages", "deadlock_timeout",
    "effective_cache_size", "idle_in_transaction_session_timeout",
    "idle_session_timeout", "lock_timeout", "log_min_messages", "log_statement",
    "maintenance_work_mem", "statement_timeout", "synchronous_commit", "temp_buffers",
    "transaction_timeout", "work_mem",
))


cdef enum:
    NEAR = 8  # of the latest idle servers, how many are looked at


cdef class Pooled(Connection):
    pass


cdef class Settings:

    def __init__(self, tuple items):
        self.items = items
        self.parsing = tuple([
            item for item in items if "." not in item[0] and item[0] not in HARMLESS
        ])

    def __repr__(self):
        return f"Settings({dict(self.items)!r})"


cdef class PoolCore:

    def __init__(self, int mode, Py_ssize_t max_statement_bytes, int max_prepared):
        self.mode = mode
        self.max_prepared = max_prepared
        self.idle = []
        self.waiters = deque()
        self.provers = deque()
        self.statements = StatementCache(max_statement_bytes)
        self.baseline = Settings(())

    @property
    def idle_servers(self):
        return self.idle[:self.idle_count]

    @property
    def waiting_count(self):
        return len(self.waiters)

    @property
    def waiting_clients(self):
        return list(self.waiters)

    cdef Connection take(self, Settings wanted):
        """An idle server, or None; one that is set as wanted if it is at hand."""
        cdef Pooled server
        cdef Py_ssize_t index
        cdef Py_ssize_t count = self.idle_count
        for index in range(count - 1, max(count - NEAR, 0) - 1, -1):
            server = <Pooled> self.idle[index]
            if server.settings is wanted:
                if index < count - 1:
                    self.idle[index:count] = self.idle[index + 1:count] + [server]
                break
        while self.idle_count:
            self.idle_count -= 1
            server = <Pooled> self.idle[self.idle_count]
            self.idle[self.idle_count] = None
            if server.fd >= 0 and not server.is_broken and server.is_lendable():
                return server
        return None

    cdef int wait(self, Connection client) except -1:
        self.waiters.append(client)
        self.wanted()
        return 0

    cdef int forget(self, Connection client) except -1:
        try:
            self.waiters.remove(client)
        except ValueError:
            pass
        return 0

    cdef Connection next_waiter(self):
        cdef Connection client
        while self.waiters:
            client = self.waiters.popleft()
            if client.fd >= 0:
                return client
        return None

    cdef int give(self, Connection server) except -1:
        if self.idle_count == len(self.idle):
            self.idle.append(server)
        else:
            self.idle[self.idle_count] = server
        self.idle_count += 1
        return 0

    def withdraw(self, Connection server):
        """Take one particular server out of the idle ones; tell if it was there."""
        try:
            self.idle.remove(server)
        except ValueError:
            return False
        self.idle_count -= 1
        return True

    def take_idle(self):
        """Take an idle server for a use of the proxy's own, or None."""
        return self.take(self.baseline)

    async def next_idle(self):
        """Wait for a server for a use of the proxy's own, before all clients."""
        future = asyncio.get_running_loop().create_future()
        self.provers.append(future)
        self.wanted()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not (future.cancelled() or future.exception()):
                future.result().enter_pool()
            raise

    def wanted(self):
        """A client waits and no server is idle: open one where that is allowed."""
        raise NotImplementedError

    # What the compiled side asks about session state; `pool.Pool` answers.

    def settings_changed(self, bytes text):
        """The names of the settings that a text may change; None for any."""
        raise NotImplementedError

    def may_reset(self, bytes text):
        """Whether a text may set something to its default."""
        raise NotImplementedError

    def named_statements(self, bytes text):
        """Which prepared statements PREPARE and the like name in a query."""
        raise NotImplementedError

    def question(self, server, client, int flags):
        """A query that tells what session state there is, or None."""
        raise NotImplementedError

    def answered(self, server, client, bytes row):
        """Take the answer; None when there was an error."""
        raise NotImplementedError

    def reset_message(self, int flags):
        """The query that takes this state from a server; None if nothing can."""
        raise NotImplementedError
