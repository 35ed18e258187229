# The scan's tables of bytes and of words, included in `_fingerprint` and filled when
# that is loaded.

Kind = IntEnum(  # in the order of KIND_
    "Kind", "EMPTY OTHER BEGIN COMMIT ROLLBACK SAVEPOINT SET SHOW COPY SELECT INSERT "
    "UPDATE DELETE MERGE PREPARE EXECUTE DEALLOCATE DECLARE FETCH CLOSE LISTEN NOTIFY "
    "DISCARD LOAD LOCK CALL EXPLAIN DDL MAINTAIN",
    start=0,
)
Flag = IntFlag(  # in the order of FLAG_
    "Flag", "TEMP LISTEN UNLISTEN ADVISORY ADVISORY_UNLOCK HOLD CLOSE PREPARE EXECUTE "
    "DEALLOCATE LOAD SET SET_LOCAL SET_CONFIG DISCARD ROLE TRANSACTION DDL "
    "PREPARED_XACT COPY ANY_SETTING SEQUENCE SEED OPAQUE",
)
ScanResult = namedtuple(
    "ScanResult", "fingerprint statements free_statements complexity flags kind"
)


cdef int know(name, word, lead, is_operand) except -1:
    cdef Scan s
    begin(&s, S_NAME, SEED_NAME)
    for c in name.encode():
        push(&s, c)
    cdef uint64_t value = name_value(s.name, s.word, s.length)
    cdef uint32_t slot = <uint32_t> (value >> 55)
    while KEYS[slot]:
        slot = (slot + 1) & (SLOTS - 1)
    KEYS[slot] = value
    KEYWORDS[slot].word = word
    KEYWORDS[slot].is_operand = is_operand
    KEYWORDS[slot].kind = KIND_OTHER
    if lead:
        KEYWORDS[slot].kind, KEYWORDS[slot].flags, KEYWORDS[slot].weight = lead
    return 0


cdef int fill_tables() except -1:
    for c in range(256):
        if c >= 128 or chr(c).isalnum() or chr(c) in "_$":
            LOWER[c] = ord(chr(c).lower()) if c < 128 else c
            CLASS[c] = C_LETTER
    for kind, members in (
        (C_SPACE, b" \t\f\v"),
        (C_NEWLINE, b"\n\r"),
        (C_DIGIT, b"0123456789"),
        (C_DOLLAR, b"$"),
        (C_OPERATOR, b"~!@#^&|`?+-*/%<>="),
        (C_QUOTE, b"'"),
        (C_DOUBLE_QUOTE, b'"'),
        (C_DOT, b"."), (C_SEMICOLON, b";"),
    ):
        for c in members:
            CLASS[c] = kind
    words = {
        W_ADVISORY_LOCK: "pg_advisory_lock pg_advisory_lock_shared "
        "pg_try_advisory_lock pg_try_advisory_lock_shared", W_ADVISORY_UNLOCK:
        "pg_advisory_unlock pg_advisory_unlock_shared pg_advisory_unlock_all",
        W_ALL: "all default", W_AND: "and", W_AS: "as", W_ATOMIC: "atomic",
        W_AUTHORIZATION: "authorization", W_BEGIN: "begin", W_BETWEEN: "between",
        W_BY: "by", W_CASE: "case", W_CHAIN: "chain", W_COMMIT: "commit abort",
        W_CONSTANT: "null true false", W_CONSTRAINTS: "constraints", W_CREATE: "create",
        W_DECLARE: "declare", W_DISTINCT: "distinct", W_END: "end",
        W_EXECUTE: "execute", W_EXPLAIN: "explain", W_FETCH: "fetch move",
        W_FROM: "from", W_GROUP: "group", W_HAVING: "having", W_HOLD: "hold",
        W_IN: "in", W_INTO: "into", W_IS: "is", W_JOIN: "join lateral",
        W_LOCAL: "local global", W_NO: "no", W_NOT: "not", W_ORDER: "order",
        W_OVER: "over", W_PG_SETTINGS: "pg_settings", W_PG_TEMP: "pg_temp",
        W_PREPARE: "prepare", W_PREPARED: "prepared", W_RECURSIVE: "recursive",
        W_RELEASE: "release close deallocate", W_REPLACE: "replace", W_RESET: "reset",
        W_RETURN: "return", W_ROLE: "role session_authorization",
        W_ROLLBACK: "rollback", W_ROUTINE: "function procedure",
        W_SAVEPOINT: "savepoint", W_SEED: "setseed", W_SELECT: "select",
        W_SEQUENCE: "currval lastval", W_SESSION: "session", W_SET: "set",
        W_SET_CONFIG: "set_config", W_TEMP: "temp temporary", W_TO: "to",
        W_TRANSACTION: "transaction", W_UNION: "union intersect except",
        W_UPDATE: "update", W_VALUES: "values", W_WITH: "with", W_WORK: "work",
    }
    leads = {  # kind, flags, hundredths of complexity
        "begin start": (KIND_BEGIN, FLAG_TRANSACTION, 0),
        "commit end": (KIND_COMMIT, FLAG_TRANSACTION, 0),
        "rollback abort": (KIND_ROLLBACK, FLAG_TRANSACTION, 0),
        "savepoint release": (KIND_SAVEPOINT, FLAG_TRANSACTION, 0),
        "set reset": (KIND_SET, 0, 0),
        "select table values with": (KIND_SELECT, 0, 0),
        "fetch move": (KIND_FETCH, 0, 0),
        "unlisten": (KIND_LISTEN, FLAG_UNLISTEN, 0),
        "call": (KIND_CALL, 0, 100),
        "do": (KIND_CALL, FLAG_OPAQUE, 100),
        "create alter drop truncate comment grant revoke security import reassign":
            (KIND_DDL, FLAG_DDL, 100),
        "vacuum analyze analyse reindex cluster refresh checkpoint":
            (KIND_MAINTAIN, 0, 200),
    }
    plain = "show insert update delete merge prepare declare notify lock explain"
    for name in plain.split():
        leads[name] = Kind[name.upper()], 0, 0
    for name in "copy execute deallocate close listen discard load".split():
        leads[name] = Kind[name.upper()], Flag[name.upper()], 0
    # Reserved words, or else a column of that name would be an operand; BETWEEN,
    # which may be one, is good enough for signs.
    operands = (
        "all and between case default distinct else from having limit not offset on "
        "or returning select then to using when where".split()
    )
    word_of = {name: word for word, names in words.items() for name in names.split()}
    lead_of = {name: lead for names, lead in leads.items() for name in names.split()}
    for name in sorted({*word_of, *lead_of, *operands}):
        know(name, word_of.get(name, 0), lead_of.get(name), name in operands)
    return 0


fill_tables()
