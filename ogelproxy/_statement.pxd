# What tokens mean: statements, session state, complexity, and the hash.
#
# The second half of the scan, in functions that are compiled into the first,
# `_fingerprint`: the lexer there says which tokens there are, here is decided
# what they make of the statement. No byte of the text is seen here.
#
# Complexity is 1.0 plus, for the heaviest statement, capped at 20.0:
#
#     0.5   each JOIN, LATERAL, sub-select (a SELECT behind a parenthesis)
#     0.6   each OVER
#     0.4   each GROUP BY
#     0.3   each ORDER BY, DISTINCT, UNION, INTERSECT, EXCEPT
#     0.1   each HAVING
#     1.0   WITH RECURSIVE; a statement of KIND_DDL or KIND_CALL
#     2.0   a statement of KIND_MAINTAIN

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ogelproxy._fingerprint cimport (
    FLAG_ADVISORY,
    FLAG_ADVISORY_UNLOCK,
    FLAG_EXECUTE,
    FLAG_HOLD,
    FLAG_PREPARE,
    FLAG_PREPARED_XACT,
    FLAG_ROLE,
    FLAG_SEED,
    FLAG_SEQUENCE,
    FLAG_SET,
    FLAG_SET_CONFIG,
    FLAG_SET_LOCAL,
    FLAG_TEMP,
    FLAG_TRANSACTION,
    KIND_EMPTY,
    KIND_OTHER,
    LISTS,
    List,
    Scan,
)


cdef enum:  # what a token is, for `take`; behind the first three comes an operand
    T_OPEN    # not the end of VALUES' rows, the only one
    T_SIGN    # may be swallowed
    T_OPERATOR
    T_NAME
    T_NUMBER  # swallows a sign
    T_LITERAL
    T_OTHER

cdef enum:  # Scan.free: what was seen of a statement that costs nothing
    F_NOT
    F_LEAD
    F_WORK
    F_AND
    F_NO
    F_CHAIN
    F_TO
    F_SAVEPOINT
    F_NAME

cdef enum:  # Scan.naming: which names are values
    N_NOT
    N_NEXT   # the next
    N_SET    # those behind TO and =
    N_LIST   # from here on, in a list
    N_ALL    # all that come
    N_FETCH  # the one behind FROM or IN
    N_TO     # the one behind TO

cdef enum:  # words that some rule below names
    W_NONE
    W_DOT        # three that are no words, for Scan.previous
    W_OPEN
    W_SEMICOLON
    W_ALL        # and DEFAULT: no names
    W_AND
    W_AS
    W_AUTHORIZATION
    W_BEGIN
    W_BETWEEN
    W_CHAIN
    W_COMMIT
    W_CONSTANT
    W_CONSTRAINTS
    W_CREATE
    W_DECLARE
    W_EXPLAIN
    W_FETCH
    W_FROM
    W_GROUP
    W_IN
    W_INTO
    W_IS
    W_LOCAL
    W_NO
    W_NOT
    W_ORDER
    W_PREPARE
    W_PREPARED
    W_RELEASE    # and others that end what they name
    W_REPLACE
    W_RESET
    W_ROLE
    W_ROLLBACK
    W_SAVEPOINT
    W_SESSION
    W_SET
    W_TO
    W_TRANSACTION
    W_UPDATE
    W_VALUES
    W_WITH
    W_WORK
    W_ATOMIC     # from here on `watch` looks at them
    W_BY
    W_CASE
    W_DISTINCT
    W_END
    W_EXECUTE
    W_HAVING
    W_HOLD
    W_JOIN
    W_OVER
    W_RECURSIVE
    W_RETURN
    W_ROUTINE
    W_SELECT
    W_TEMP
    W_UNION
    W_PG_TEMP    # from here on names, known also in quotes and behind a dot
    W_PG_SETTINGS
    W_ADVISORY_LOCK
    W_ADVISORY_UNLOCK
    W_SEED
    W_SEQUENCE
    W_SET_CONFIG

cdef enum:
    LITERAL = 63       # the value of every literal: a question mark
    SEED_HASH = 0x101  # what the hashes of different things begin with
    SEED_NAME = 0x102
    SEED_UNICODE = 0x103
    SEED_OPERATOR = 0x104
    SEED_ELEMENT = 0x105
    NOT_EQUAL = 0x3d21   # the operator !=
    LESS_GREATER = 0x3e3c  # the operator <>
    MAX_WEIGHT = 1900  # hundredths above 1.0


cdef struct Keyword:
    uint32_t flags   # of a statement that it leads
    uint32_t weight  # likewise, hundredths
    uint8_t kind     # likewise
    uint8_t word
    uint8_t is_operand  # a reserved word behind which an expression may start


cdef inline uint64_t mix(uint64_t hash, uint64_t value) noexcept nogil:
    # The rotation keeps a list of lists from cancelling out what it is equal to.
    hash = ((hash << 23 | hash >> 41) ^ value) * <uint64_t> 0x9E3779B97F4A7C15
    return hash ^ (hash >> 32)


cdef inline uint64_t name_value(
    uint64_t name, uint64_t word, uint32_t length
) noexcept nogil:
    return mix(name + (<uint64_t> length << 16), word)


# Statements and lists.

cdef inline void renew(Scan* s) noexcept nogil:
    s.string = 0
    s.sign = 0
    s.depth = 0
    s.body = 0
    s.weight = 0
    s.tokens = 0
    s.is_begun = 0
    s.is_special = 1
    s.lead = W_NONE
    s.second = W_NONE
    s.previous = W_NONE
    s.free = F_NOT
    s.naming = N_NOT
    s.is_operand = 0
    s.is_routine = 0
    s.lists = 0


cdef inline void settle_sign(Scan* s) noexcept nogil:
    if s.sign:
        s.hash = mix(s.hash, s.sign)
        s.sign = 0


cdef inline void open_list(Scan* s, uint8_t is_rows) noexcept nogil:
    cdef List* inner
    if s.lists == LISTS:
        return
    inner = &s.list[s.lists]
    inner.outer = s.hash
    inner.element = 0
    inner.depth = s.depth
    inner.is_rows = is_rows
    s.hash = SEED_ELEMENT
    s.lists += 1


cdef inline void end_element(Scan* s) noexcept nogil:
    cdef List* inner = &s.list[s.lists - 1]
    if s.hash != inner.element:
        inner.outer = mix(inner.outer, s.hash)
        inner.element = s.hash
    s.hash = SEED_ELEMENT


cdef inline void close_list(Scan* s) noexcept nogil:
    end_element(s)
    s.lists -= 1
    s.hash = s.list[s.lists].outer


cdef inline bint is_in_list(Scan* s) noexcept nogil:
    return s.lists and s.list[s.lists - 1].depth == s.depth


cdef inline void end_statement(Scan* s) noexcept nogil:
    if not s.is_begun:
        return
    settle_sign(s)
    while s.lists:
        close_list(s)
    s.statements += 1
    if s.free in (F_LEAD, F_WORK, F_CHAIN, F_SAVEPOINT, F_NAME):
        s.free_statements += 1
    if s.weight > MAX_WEIGHT:
        s.weight = MAX_WEIGHT
    if s.complexity < 100 + s.weight:
        s.complexity = 100 + s.weight
    if s.kind == KIND_EMPTY:
        s.kind = KIND_OTHER
    renew(s)


# Tokens.

cdef inline void lead(Scan* s, const Keyword* keyword, uint8_t shape) noexcept nogil:
    """The first three tokens say what a statement does."""
    cdef uint8_t word = keyword.word if keyword else W_NONE
    if s.tokens == 0:
        if shape == T_OPEN:
            return  # (SELECT ..) UNION (SELECT ..)
        s.lead = word
        if keyword:
            s.flags |= keyword.flags
            s.weight = keyword.weight
        if s.kind == KIND_EMPTY:
            s.kind = keyword.kind if keyword else KIND_OTHER
        if word:
            s.naming = naming_of(word)
    elif s.tokens == 1:
        s.second = word
        if word == W_PREPARED and s.lead in (W_COMMIT, W_ROLLBACK):
            s.flags |= FLAG_PREPARED_XACT
        elif s.lead == W_RESET:
            s.flags |= FLAG_SET
            if word in (W_ROLE, W_SESSION):
                s.flags |= FLAG_ROLE
    elif s.lead == W_PREPARE:
        # A statement may be named transaction; a literal tells them apart.
        if s.second == W_TRANSACTION and shape == T_LITERAL:
            s.flags |= FLAG_PREPARED_XACT | FLAG_TRANSACTION
        else:
            s.flags |= FLAG_PREPARE
    elif s.lead == W_SET:
        # A setting's name may begin as these words do: SET local.answer = 42.
        if s.second in (W_LOCAL, W_TRANSACTION, W_CONSTRAINTS) and shape == T_NAME:
            s.flags |= FLAG_SET_LOCAL
        else:
            s.flags |= FLAG_SET
            if s.second == W_ROLE or (
                s.second == W_SESSION and word in (W_AUTHORIZATION, W_ROLE)
            ):
                s.flags |= FLAG_ROLE
    s.tokens += 1


cdef inline uint8_t naming_of(uint8_t lead) noexcept nogil:
    if lead in (W_SAVEPOINT, W_RELEASE, W_DECLARE):
        return N_NEXT
    if lead == W_SET:
        return N_SET
    if lead == W_FETCH:
        return N_FETCH
    return N_TO if lead == W_ROLLBACK else N_NOT


cdef inline uint64_t named(
    Scan* s, uint64_t value, uint8_t word, uint8_t shape
) noexcept nogil:
    """Names that drivers make up for each use, and what SET sets to, are values."""
    cdef uint64_t equals = mix(SEED_OPERATOR + 1, b"=")
    if s.naming == N_SET:
        if word == W_TO or (shape == T_OPERATOR and value == equals):
            s.naming = N_LIST
            return equals
        if shape == T_NAME and s.previous in (W_ROLE, W_AUTHORIZATION):
            return LITERAL
    elif s.naming == N_FETCH:
        if word == W_FROM or word == W_IN:
            s.naming = N_NEXT
    elif s.naming == N_TO:
        if word == W_TO:
            s.naming = N_NEXT
    elif shape == T_NAME and word not in (W_ALL, W_SAVEPOINT, W_PREPARE):
        if s.naming == N_NEXT:
            s.naming = N_NOT
        return LITERAL
    return value


cdef inline uint8_t next_free(Scan* s, uint8_t word, uint8_t shape) noexcept nogil:
    cdef uint8_t free = s.free
    if shape != T_NAME:
        return F_NOT
    if free == F_LEAD and word in (W_WORK, W_TRANSACTION):
        return F_WORK
    if free == F_LEAD or free == F_WORK:
        if word == W_AND:
            return F_AND
        if word == W_TO and s.lead == W_ROLLBACK:
            return F_TO
    if free == F_AND and word == W_NO:
        return F_NO
    if (free == F_AND or free == F_NO) and word == W_CHAIN:
        return F_CHAIN
    if free == F_TO:
        return F_SAVEPOINT if word == W_SAVEPOINT else F_NAME
    if free == F_SAVEPOINT:
        return F_NAME
    return F_NOT


cdef inline void watch(Scan* s, uint8_t word) noexcept nogil:
    """Words that matter anywhere in a statement."""
    cdef uint32_t weight = 0
    if word == W_SELECT:
        if s.previous == W_OPEN and s.tokens > 1:
            weight = 50
    elif word == W_JOIN:  # and LATERAL
        weight = 50
    elif word == W_BY:
        weight = (
            30 if s.previous == W_ORDER else 40 if s.previous == W_GROUP else 0
        )
    elif word == W_OVER:
        weight = 60
    elif word == W_DISTINCT:
        if s.previous not in (W_IS, W_NOT):  # IS [NOT] DISTINCT FROM
            weight = 30
    elif word == W_UNION:  # and INTERSECT, EXCEPT
        weight = 30
    elif word == W_HAVING:
        weight = 10
    elif word == W_RECURSIVE:
        weight = 100 if s.previous == W_WITH else 0
    elif word == W_TEMP:
        if s.previous in (W_CREATE, W_REPLACE, W_LOCAL, W_INTO):
            s.flags |= FLAG_TEMP
    elif word == W_EXECUTE:
        if s.lead == W_EXPLAIN or s.previous == W_AS:
            s.flags |= FLAG_EXECUTE
    elif word == W_HOLD:
        if s.lead == W_DECLARE and s.previous == W_WITH:
            s.flags |= FLAG_HOLD
    elif word == W_ROUTINE:
        if s.previous in (W_CREATE, W_REPLACE) and s.lead == W_CREATE:
            s.is_routine = 1
    elif word == W_ATOMIC:
        if s.is_routine and s.previous == W_BEGIN and s.depth == 0 and s.body == 0:
            s.body = 1
    elif word == W_CASE:
        # Any word may be a column's label: `SELECT a case`. Taking that for an
        # expression would hide the statements behind this one.
        if s.body and s.depth == 0 and s.is_operand and s.previous != W_BETWEEN:
            s.body += 1
    elif word == W_END:
        if s.body and s.depth == 0 and s.previous != W_AS:
            s.body -= 1
    elif word == W_PG_TEMP:
        s.flags |= FLAG_TEMP
    elif word == W_PG_SETTINGS:
        if s.lead == W_UPDATE:
            s.flags |= FLAG_SET_CONFIG
    elif word == W_ADVISORY_LOCK:
        s.flags |= FLAG_ADVISORY
    elif word == W_ADVISORY_UNLOCK:
        s.flags |= FLAG_ADVISORY_UNLOCK
    elif word == W_SET_CONFIG:
        s.flags |= FLAG_SET_CONFIG
    if s.weight < MAX_WEIGHT:
        s.weight += weight


cdef inline bint expects_operand(Scan* s, uint8_t word) noexcept nogil:
    """Whether an expression may start behind a word that may also be a name."""
    if word == W_BY:
        return s.previous in (W_ORDER, W_GROUP)
    return word == W_RETURN and s.previous in (W_ATOMIC, W_SEMICOLON)


cdef inline void take(
    Scan* s, uint64_t value, const Keyword* keyword, uint8_t shape
) noexcept nogil:
    cdef uint8_t word = keyword.word if keyword else W_NONE
    if s.is_special or shape == T_SIGN or word >= W_ATOMIC:
        take_special(s, value, keyword, shape)
        return
    s.string = 0
    if shape != T_OPEN:
        end_rows(s)
    s.hash = mix(s.hash, value)
    s.previous = word
    s.is_operand = keyword.is_operand if keyword else shape <= T_OPERATOR


cdef inline void end_rows(Scan* s) noexcept nogil:
    if is_in_list(s) and s.list[s.lists - 1].is_rows:
        close_list(s)


cdef inline void take_special(
    Scan* s, uint64_t value, const Keyword* keyword, uint8_t shape
) noexcept nogil:
    """Take any token, also where it is more than one among others."""
    cdef uint8_t word = W_NONE
    cdef bint is_operand = shape <= T_OPERATOR
    if not s.is_begun:
        s.is_begun = 1
        if s.statements:
            s.hash = mix(s.hash, b";")
    s.string = 0
    if s.sign:
        if shape != T_NUMBER:
            s.hash = mix(s.hash, s.sign)
        s.sign = 0
    if shape != T_OPEN:
        end_rows(s)
    if s.free:
        s.free = next_free(s, keyword.word if keyword else W_NONE, shape)
    if s.naming:
        value = named(s, value, keyword.word if keyword else W_NONE, shape)
    if s.tokens < 3:
        lead(s, keyword, shape)
        if s.tokens == 1 and s.lead in (W_COMMIT, W_END, W_ROLLBACK):
            s.free = F_LEAD
    if keyword:
        word = keyword.word
        is_operand = keyword.is_operand
        if word:
            watch(s, word)
            is_operand = is_operand or expects_operand(s, word)
    if shape == T_SIGN:
        s.sign = value
    else:
        s.hash = mix(s.hash, value)
    s.previous = word
    s.is_operand = is_operand
    if s.naming == N_LIST:
        s.naming = N_ALL
        open_list(s, False)
    s.is_special = s.free or s.naming or s.sign != 0 or s.tokens == 0 or (
        s.tokens < 3
        and s.lead in (W_COMMIT, W_PREPARE, W_RESET, W_ROLLBACK, W_SET)
    )


cdef inline void take_mark(Scan* s, uint8_t c) noexcept nogil:
    cdef uint8_t before = s.previous
    if c == b"(":
        if before == W_VALUES:
            open_list(s, True)
        elif before == W_SEQUENCE:
            s.flags |= FLAG_SEQUENCE
        elif before == W_SEED:
            s.flags |= FLAG_SEED
        take(s, c, NULL, T_OPEN)
        s.previous = W_OPEN
        s.depth += 1
        if before == W_IN:
            open_list(s, False)
    elif c == b"[":
        take(s, c, NULL, T_OPERATOR)
        s.depth += 1
        open_list(s, False)
    elif c == b")" or c == b"]":
        settle_sign(s)
        while is_in_list(s):
            close_list(s)
        take(s, c, NULL, T_OTHER)
        if s.depth:
            s.depth -= 1
    elif c == b"," and is_in_list(s):
        settle_sign(s)
        end_element(s)
        s.string = 0
        s.previous = W_NONE
        s.is_operand = 1
    elif c == b"," or c == b":":
        take(s, c, NULL, T_OPERATOR)
    else:
        take(s, c, NULL, T_OTHER)


cdef inline void take_dot(Scan* s) noexcept nogil:
    take(s, b".", NULL, T_OTHER)
    s.previous = W_DOT


cdef inline void take_operator(Scan* s, uint64_t word, uint32_t length) noexcept nogil:
    cdef uint8_t shape = T_OPERATOR
    if length == 1 and s.is_operand and (word == b"+" or word == b"-"):
        shape = T_SIGN
    elif word == NOT_EQUAL:
        word = LESS_GREATER
    take(s, mix(SEED_OPERATOR + length, word), NULL, shape)
