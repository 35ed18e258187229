"""The accounting table: one open batch, in memory that outlives the process.

The table lies in a shared map of the batch file, so what was counted is the
kernel's the moment it is stored: a kill loses nothing, at no system call per
query. Knows neither directories nor sinks; `usage.spool` makes the files and
reads them back, `usage.Meter` says when to leave one for the next.

A batch file is one header and then slots of 128 bytes, handed out in order: three
for each payer (its record, and its row of rest for what has no row of its own),
one for each row. Room for every living attribution is kept free, so counting
never finds the file full: at worst fingerprints are no longer told apart.
"""

import heapq
import mmap
from os import fstat

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from ogelproxy.errors import ServerBusy, SpoolUnusable


cdef extern from "<stdatomic.h>" nogil:
    ctypedef enum memory_order:
        memory_order_seq_cst
    void atomic_signal_fence(memory_order order)

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int CLOCK_REALTIME_COARSE
    int clock_gettime(int clock, timespec* now)

cdef enum:
    LAYOUT = 1
    SLOT_BYTES = 128
    PAYER_SLOTS = 3              # record (2) and row of rest (1)
    REST = 2                     # of the row of rest behind its payer
    KIND_PAYER = 1
    KIND_ROW = 2
    PARALLEL_ROWS = 1000         # more rows than this count as two workers
    NEVER = 0xFFFFFFFF           # a batch that no table reaches

cdef double GIB = 1 << 30
cdef bytes MAGIC = b"O7SUSAGE"

if (
    sizeof(Header) != SLOT_BYTES
    or sizeof(Row) != SLOT_BYTES
    or sizeof(Payer) != 2 * SLOT_BYTES
):
    raise ImportError("the compiler laid out usage rows in an unknown way")


cdef inline void ordered() noexcept nogil:
    # A kill may fall between any two instructions. It sees stores in the order
    # of the program, so only the compiler must be kept from moving them.
    atomic_signal_fence(memory_order_seq_cst)


cdef inline double wall_clock() noexcept nogil:
    # The coarse clock (4 ms) costs a quarter of the fine one.
    cdef timespec now
    clock_gettime(CLOCK_REALTIME_COARSE, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef inline uint64_t mixed(uint32_t payer, uint64_t fingerprint) noexcept nogil:
    # Fingerprints are hashes already; the multiplication spreads the payers.
    cdef uint64_t h = fingerprint ^ (payer * <uint64_t> 0x9E3779B97F4A7C15)
    return h ^ (h >> 32)


cdef int put_text(char* field, Py_ssize_t size, str text) except -1:
    # Cut between characters, never inside one; what follows stays zero.
    cdef bytes encoded = text.encode("utf-8", "replace").split(b"\0", 1)[0]
    if len(encoded) > size:
        encoded = encoded[:size].decode("utf-8", "ignore").encode()
    memcpy(field, <const char*> encoded, len(encoded))
    return 0


cdef int check_id(bytes organisation) except -1:
    if len(organisation) != 16:
        raise ValueError("an organisation's id has 16 bytes")
    return 0


# Its table must still be there in __dealloc__; the two can't form a cycle.
@cython.no_gc_clear
@cython.final
cdef class Attribution:

    def __cinit__(
        self, UsageTable table not None, bytes organisation not None, *,
        str handle not None, str database not None, str database_type not None,
        str tier not None, str application_name not None, double work_mem_bytes,
    ):
        check_id(organisation)
        self.batch = NEVER
        self.work_mem = work_mem_bytes
        memcpy(self.payer.organisation, <const char*> organisation, 16)
        put_text(self.payer.handle, sizeof(self.payer.handle), handle)
        put_text(self.payer.database, sizeof(self.payer.database), database)
        put_text(
            self.payer.application_name,
            sizeof(self.payer.application_name),
            application_name,
        )
        put_text(
            self.payer.database_type, sizeof(self.payer.database_type), database_type
        )
        put_text(self.payer.tier, sizeof(self.payer.tier), tier)
        if not table.has_room(PAYER_SLOTS):
            raise ServerBusy("no room in the usage table: raise usage.max_rows")
        table.live += 1
        table.unclaimed += 1
        self.table = table

    def __dealloc__(self):
        if self.table is None:
            return
        self.table.live -= 1
        if self.batch != self.table.number:
            self.table.unclaimed -= 1


@cython.final
cdef class UsageTable:

    def __cinit__(self, uint32_t max_rows):
        cdef uint32_t size = 1
        if not 0 < max_rows <= 1 << 20:
            raise ValueError("max_rows is out of range")
        while size < 2 * max_rows:
            size *= 2
        self.index = <Place*> calloc(size, sizeof(Place))
        if self.index == NULL:
            raise MemoryError
        self.mask = size - 1
        self.max_rows = max_rows
        self.capacity = 1 + (1 + PAYER_SLOTS) * max_rows
        self.used = 1

    def __dealloc__(self):
        self.leave()
        free(self.index)

    @property
    def file_bytes(self):
        return self.capacity * SLOT_BYTES

    @property
    def used_bytes(self):
        return self.used * SLOT_BYTES

    @property
    def batch(self):
        return self.number

    @property
    def is_empty(self):
        return not self.touched

    @property
    def is_full(self):
        return (
            self.row_count >= self.max_rows - self.max_rows // 8
            or not self.has_room(self.capacity // 8)
        )

    def rotate(self, path):
        cdef Py_buffer view
        cdef Header* header
        with open(path, "r+b") as file:
            # A byte past the end of the file would be SIGBUS, not an exception.
            if fstat(file.fileno()).st_size != self.file_bytes:
                raise SpoolUnusable(f"{path} has another size than the table")
            mapped = mmap.mmap(file.fileno(), self.file_bytes)
        PyObject_GetBuffer(mapped, &view, PyBUF_WRITABLE)
        header = <Header*> view.buf
        if (
            header.magic[:8] != MAGIC
            or header.layout != LAYOUT
            or header.slots != self.capacity
            or not self.latest < header.batch < NEVER
        ):
            PyBuffer_Release(&view)
            raise SpoolUnusable(f"{path} is not a new batch of this table")
        left = self.used_bytes
        self.leave()
        self.view = view
        self.slots = <Row*> view.buf
        self.number = self.latest = header.batch
        return left

    def close(self):
        left = self.used_bytes
        self.leave()
        return left

    def record(
        self, Attribution who not None, *, uint64_t fingerprint=0,
        uint32_t complexity=100, uint32_t queries=1, uint32_t refused=0,
        bytes sqlstate=None, uint64_t rows=0, uint64_t bytes_in=0,
        uint64_t bytes_out=0, double server_seconds=0, double queue_seconds=0,
        double throttled_seconds=0,
    ):
        cdef Measure m
        if who.table is not self:
            raise ValueError("the attribution belongs to another table")
        memset(&m, 0, sizeof(Measure))
        m.fingerprint = fingerprint
        m.complexity = complexity
        m.queries = queries
        m.refused = refused
        if sqlstate is not None:
            if len(sqlstate) != 5:
                raise ValueError("an SQLSTATE has five characters")
            m.failed = 1
            memcpy(m.sqlstate, <const char*> sqlstate, 5)
        m.rows = rows
        m.bytes_in = bytes_in
        m.bytes_out = bytes_out
        m.server_seconds = server_seconds
        m.queue_seconds = queue_seconds
        m.throttled_seconds = throttled_seconds
        self.count(who, &m)

    def sums(self, bytes organisation not None):
        cdef uint32_t slot = 0
        cdef Row* row
        cdef Row* total
        check_id(organisation)
        totals = {}
        while (slot := self.next_row(slot, organisation)):
            row = self.slots + slot
            if row.payer not in totals:
                totals[row.payer] = bytearray((<char*> row)[:SLOT_BYTES])
                continue
            total = <Row*> PyByteArray_AS_STRING(totals[row.payer])
            total.queries += row.queries
            total.refused += row.refused
            total.errors += row.errors
            total.rows += row.rows
            total.bytes_in += row.bytes_in
            total.bytes_out += row.bytes_out
            total.server_seconds += row.server_seconds
            total.queue_seconds += row.queue_seconds
            total.throttled_seconds += row.throttled_seconds
            total.vcpu_seconds += row.vcpu_seconds
            total.memory_gib_seconds += row.memory_gib_seconds
            total.first_at = min(total.first_at, row.first_at)
            total.last_at = max(total.last_at, row.last_at)
        return [(self.payer_at(slot), bytes(each)) for slot, each in totals.items()]

    def longest(self, bytes organisation not None, int count):
        cdef uint32_t slot = 0
        check_id(organisation)
        rows = []
        while (slot := self.next_row(slot, organisation)):
            if self.slots[slot].fingerprint and self.slots[slot].queries:
                rows.append((self.slots[slot].longest_seconds, slot))
        return [
            (
                self.payer_at(self.slots[slot].payer),
                (<char*> (self.slots + slot))[:SLOT_BYTES],
            )
            for _, slot in heapq.nlargest(count, rows)
        ]

    cdef uint32_t next_row(self, uint32_t slot, bytes organisation) noexcept:
        """The slot of the organisation's next counted row behind `slot`; 0 for none."""
        cdef Row* row
        cdef Payer* payer
        slot += 1
        while slot < self.used:
            row = self.slots + slot
            if row.kind == KIND_PAYER:
                slot += REST
                continue
            payer = <Payer*> (self.slots + row.payer)
            if row.first_at and memcmp(
                payer.organisation, <const char*> organisation, 16
            ) == 0:
                return slot
            slot += 1
        return 0

    cdef bytes payer_at(self, uint32_t slot):
        return (<char*> (self.slots + slot))[:sizeof(Payer)]

    cdef void count(self, Attribution who, const Measure* m) noexcept:
        cdef Row* row
        cdef double now
        cdef double duration = m.server_seconds
        if who.batch != self.number and not self.claim(who):
            return
        row = self.find(who.slot, m.fingerprint)
        now = wall_clock()
        if row.first_at == 0:
            row.first_at = now
        # First the counter that is the truth: killed from here on, the query is
        # there and at worst a part of what it used is not.
        ordered()
        row.queries += m.queries
        ordered()
        row.refused += m.refused
        row.rows += m.rows
        row.bytes_in += m.bytes_in
        row.bytes_out += m.bytes_out
        row.server_seconds += duration
        row.queue_seconds += m.queue_seconds
        row.throttled_seconds += m.throttled_seconds
        row.vcpu_seconds += (
            duration * (m.complexity * 0.01) * (2 if m.rows > PARALLEL_ROWS else 1)
        )
        row.memory_gib_seconds += duration * (who.work_mem + m.bytes_out) / GIB
        if duration > row.longest_seconds:
            row.longest_seconds = <float> duration
        row.last_at = now
        if m.failed:
            row.errors += 1
            memcpy(row.sqlstate, m.sqlstate, 5)
        self.touched = True

    cdef bint claim(self, Attribution who) noexcept:
        """Give `who` its slots in this batch; False while there is none."""
        cdef Payer* payer
        cdef Row* rest
        if self.slots == NULL:
            return False
        payer = <Payer*> (self.slots + self.used)
        rest = self.slots + self.used + REST
        memcpy(payer, &who.payer, sizeof(Payer))
        rest.payer = self.used
        rest.kind = KIND_ROW
        # The kind is what the reader goes by: it comes when all else is there.
        ordered()
        payer.kind = KIND_PAYER
        who.slot = self.used
        who.batch = self.number
        self.used += PAYER_SLOTS
        self.unclaimed -= 1
        return True

    cdef Row* find(self, uint32_t payer, uint64_t fingerprint) noexcept:
        """Return the row of this pair, or its payer's row of rest."""
        cdef uint32_t at
        cdef Place* place
        cdef Row* row
        if fingerprint == 0:
            return self.slots + payer + REST
        at = <uint32_t> mixed(payer, fingerprint) & self.mask
        place = self.index + at
        while place.slot != 0:
            if place.fingerprint == fingerprint and place.payer == payer:
                return self.slots + place.slot
            at = (at + 1) & self.mask
            place = self.index + at
        if self.row_count == self.max_rows or not self.has_room(1):
            return self.slots + payer + REST
        row = self.slots + self.used
        row.payer = payer
        row.fingerprint = fingerprint
        ordered()
        row.kind = KIND_ROW
        place.fingerprint = fingerprint
        place.payer = payer
        place.slot = self.used
        self.used += 1
        self.row_count += 1
        return row

    cdef bint has_room(self, uint32_t slots) noexcept:
        """Tell whether `slots` are left beside those kept for the unclaimed."""
        return self.used + PAYER_SLOTS * self.unclaimed + slots <= self.capacity

    cdef void leave(self):
        """Forget the open batch; the file has all of it."""
        if self.slots != NULL:
            PyBuffer_Release(&self.view)
            memset(self.index, 0, (<size_t> self.mask + 1) * sizeof(Place))
        self.slots = NULL
        self.number = 0
        self.used = 1
        self.row_count = 0
        self.unclaimed = self.live
        self.touched = False
