# One pass over SQL text, in as many parts as it arrives in: how many statements,
# of which kind, with what session state, how heavy, and a hash of their shape.
#
#     cdef Scan scan
#     scan_start(&scan)
#     scan_feed(&scan, text, size)     # any number of times, cut anywhere
#     scan_finish(&scan)
#
# No allocation, no exception, no Python. Any bytes are SQL enough.

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:  # Scan.kind: the leading keyword of the first statement
    KIND_EMPTY = 0     # no statement at all
    KIND_OTHER = 1
    KIND_BEGIN = 2     # BEGIN, START
    KIND_COMMIT = 3    # COMMIT, END
    KIND_ROLLBACK = 4  # ROLLBACK, ABORT, with or without TO SAVEPOINT
    KIND_SAVEPOINT = 5  # SAVEPOINT, RELEASE
    KIND_SET = 6       # SET, RESET
    KIND_SHOW = 7
    KIND_COPY = 8
    KIND_SELECT = 9    # SELECT, TABLE, VALUES, WITH
    KIND_INSERT = 10
    KIND_UPDATE = 11
    KIND_DELETE = 12
    KIND_MERGE = 13
    KIND_PREPARE = 14
    KIND_EXECUTE = 15
    KIND_DEALLOCATE = 16
    KIND_DECLARE = 17
    KIND_FETCH = 18    # FETCH, MOVE
    KIND_CLOSE = 19
    KIND_LISTEN = 20   # LISTEN, UNLISTEN
    KIND_NOTIFY = 21
    KIND_DISCARD = 22
    KIND_LOAD = 23
    KIND_LOCK = 24
    KIND_CALL = 25     # CALL, DO
    KIND_EXPLAIN = 26
    KIND_DDL = 27      # CREATE, ALTER, DROP, GRANT and the like
    KIND_MAINTAIN = 28  # VACUUM, ANALYZE, REINDEX and the like


cdef enum:  # Scan.flags: session state that some statement may make or end
    FLAG_TEMP = 1 << 0              # CREATE TEMP, INTO TEMP, anything in pg_temp
    FLAG_LISTEN = 1 << 1
    FLAG_UNLISTEN = 1 << 2
    FLAG_ADVISORY = 1 << 3          # session-level advisory lock taken
    FLAG_ADVISORY_UNLOCK = 1 << 4
    FLAG_HOLD = 1 << 5              # DECLARE ... WITH HOLD
    FLAG_CLOSE = 1 << 6
    FLAG_PREPARE = 1 << 7
    FLAG_EXECUTE = 1 << 8           # also EXPLAIN EXECUTE and CREATE ... AS EXECUTE
    FLAG_DEALLOCATE = 1 << 9
    FLAG_LOAD = 1 << 10
    FLAG_SET = 1 << 11              # SET, SET SESSION and RESET
    FLAG_SET_LOCAL = 1 << 12        # SET LOCAL, SET TRANSACTION, SET CONSTRAINTS
    FLAG_SET_CONFIG = 1 << 13       # set_config(), UPDATE pg_settings
    FLAG_DISCARD = 1 << 14
    FLAG_ROLE = 1 << 15             # SET or RESET of role, session authorization
    FLAG_TRANSACTION = 1 << 16      # BEGIN ... ROLLBACK, SAVEPOINT, RELEASE
    FLAG_DDL = 1 << 17
    FLAG_PREPARED_XACT = 1 << 18    # PREPARE TRANSACTION, COMMIT PREPARED, ...
    FLAG_COPY = 1 << 19
    FLAG_ANY_SETTING = 1 << 20      # set by `_client`: settings of unknown name
    FLAG_SEQUENCE = 1 << 21         # currval(), lastval()
    FLAG_SEED = 1 << 22             # setseed()
    FLAG_OPAQUE = 1 << 23           # DO: what it does isn't seen


cdef enum:
    LISTS = 8  # lists within lists whose equal elements are folded


cdef struct List:
    uint64_t outer    # the hash of what is around the list
    uint64_t element  # the hash of the element before; 0 at the first
    uint32_t depth    # brackets open around its elements
    uint8_t is_rows   # VALUES (..), (..): ends with the first thing not a row


cdef struct Scan:
    # The answers. During the scan the two counts cover the statements that have
    # ended, so that their difference only grows and never passes the final one.
    uint64_t fingerprint      # of all statements; set by scan_finish, never 0
    uint32_t statements       # those that are not empty
    uint32_t free_statements  # COMMIT, ROLLBACK, ROLLBACK TO among them
    uint32_t complexity       # hundredths: 100 is 1.0
    uint32_t flags            # FLAG_
    uint8_t kind              # KIND_

    # The lexer: what the bytes so far are in the middle of.
    uint8_t state
    uint8_t string            # the state of strings that a newline may continue
    uint8_t has_newline       # a newline came since that string
    uint8_t has_special       # the operator has what lets it end with a sign
    uint32_t comments         # block comments open
    uint32_t length           # bytes of the name, operator or tag so far
    uint64_t word             # the up to 8 bytes of it not yet in `name`
    uint64_t name             # hash of the bytes before them
    uint64_t tag              # hash of the dollar quote's tag
    uint64_t candidate        # hash of what may be the tag that ends it

    # The statement so far.
    uint64_t hash
    uint64_t sign             # a sign that a number after it would swallow
    uint32_t depth            # brackets open
    uint32_t body             # BEGIN ATOMIC and the CASEs in it that are open
    uint32_t weight           # complexity above 1.0, hundredths
    uint8_t tokens            # 0 to 3 (or more), from the leading keyword on
    uint8_t is_special        # the next token may mean more than its hash
    uint8_t is_begun          # some token came, if only a parenthesis
    uint8_t lead              # its first, second and latest word
    uint8_t second
    uint8_t previous
    uint8_t free              # how far it is like a free statement
    uint8_t naming            # which names count as values
    uint8_t is_operand        # an expression may start here
    uint8_t is_routine        # CREATE FUNCTION or PROCEDURE
    uint8_t lists             # entries of `list` in use
    List list[LISTS]


cdef void scan_start(Scan* s) noexcept nogil
cdef void scan_feed(Scan* s, const char* text, Py_ssize_t size) noexcept nogil
cdef void scan_finish(Scan* s) noexcept nogil
