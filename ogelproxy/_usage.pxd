cimport cython
from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t


# One finished or refused query, filled by who relayed it. All zero is valid.
cdef struct Measure:
    uint64_t fingerprint
    uint32_t complexity      # hundredths: 100 = 1.0
    uint32_t queries         # usually 1; 0 for a refusal
    uint32_t refused         # refused by the limiter
    uint8_t failed           # 1 when the server answered with an error
    char sqlstate[5]         # of that error
    uint64_t rows
    uint64_t bytes_in
    uint64_t bytes_out
    double server_seconds
    double queue_seconds
    double throttled_seconds


# The three kinds of slot in a batch file. `usage.spool` reads the same layout;
# a change here is a new LAYOUT there. All integers little-endian.
cdef struct Header:          # one slot
    char magic[8]
    uint32_t layout
    uint32_t slots           # of the whole file, this one included
    uint64_t batch
    double opened_at         # Unix time
    char node[16]
    char spare[80]

cdef struct Payer:           # two slots, and a third for its Row of rest
    uint8_t kind
    char spare[3]
    char organisation[16]
    char handle[60]
    char tier[32]
    char database_type[16]
    char database[64]
    char application_name[64]

cdef struct Row:             # one slot
    uint8_t kind
    char sqlstate[5]         # of the latest error
    char spare[2]
    uint32_t payer           # slot number
    float longest_seconds
    uint64_t fingerprint     # 0 in a row of rest
    uint64_t queries
    uint64_t refused
    uint64_t errors
    uint64_t rows
    uint64_t bytes_in
    uint64_t bytes_out
    double server_seconds
    double queue_seconds
    double throttled_seconds
    double vcpu_seconds
    double memory_gib_seconds
    double first_at          # Unix time
    double last_at

cdef struct Place:           # one entry of the hash index
    uint64_t fingerprint
    uint32_t payer
    uint32_t slot            # 0 when free: slot 0 is the header


@cython.final
cdef class Attribution:
    cdef UsageTable table
    cdef uint64_t batch      # in which `slot` holds; NEVER before the first
    cdef uint32_t slot       # of its Payer in that batch
    cdef double work_mem     # bytes
    cdef Payer payer         # as it will be written
    cdef object __weakref__


@cython.final
cdef class UsageTable:
    cdef Py_buffer view      # the map of the open batch
    cdef Row* slots          # its slots; NULL while there is none
    cdef Place* index        # rows by payer and fingerprint
    cdef uint32_t mask       # size of the index - 1
    cdef uint32_t capacity   # slots of a batch file
    cdef uint32_t max_rows
    cdef uint32_t used       # slots taken; the next free one
    cdef uint32_t row_count  # rows with a fingerprint
    cdef uint32_t live       # attributions that exist
    cdef uint32_t unclaimed  # of these, without a slot in this batch
    cdef uint64_t number     # of the open batch; 0 while there is none
    cdef uint64_t latest     # batch ever opened: numbers only grow
    cdef bint touched        # something was counted in this batch

    cdef void count(self, Attribution who, const Measure* m) noexcept
    cdef uint32_t next_row(self, uint32_t slot, bytes organisation) noexcept
    cdef bytes payer_at(self, uint32_t slot)
    cdef bint claim(self, Attribution who) noexcept
    cdef Row* find(self, uint32_t payer, uint64_t fingerprint) noexcept
    cdef bint has_room(self, uint32_t slots) noexcept
    cdef void leave(self)
