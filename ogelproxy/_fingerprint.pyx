"""Scan: what SQL text is like, found in one pass over its bytes.

The lexer follows Postgres's (src/backend/parser/scan.l, version 17) with
standard_conforming_strings on, and splits statements where the server's parser
does. Nothing is parsed: whether the SQL is right is for the server to say.

The fingerprint is a 64-bit hash of the tokens in which are equal: literals,
$n parameters and a sign before a number; NULL, TRUE and FALSE where they are
values; letter case of unquoted names, and "name" and name; any comments and
white space; `!=` and `<>`; one element or several equal ones of IN (..), [..]
and VALUES (..), (..); trailing semicolons; names of savepoints, of cursors and
behind DEALLOCATE; and what SET sets to. It is the same in every process, and no
secret: whoever wants two statements to collide can have it.
"""

from collections import namedtuple
from enum import IntEnum, IntFlag
from os import urandom

from ogelproxy._octets cimport *
from ogelproxy._statement cimport *


cdef enum:  # Scan.state
    S_GROUND        # between tokens
    S_NAME
    S_UNICODE       # behind u&
    S_QUOTED        # in a quoted name
    S_QUOTED_QUOTE  # behind a quote in it: the end, or the first of two
    S_OPERATOR
    S_STRING, S_STRING_QUOTE
    S_ESCAPE, S_ESCAPE_QUOTE, S_ESCAPE_SLASH  # in E'', where \' is no end
    S_DOLLAR        # behind a dollar that begins something
    S_TAG           # in the tag that begins a dollar quote
    S_BODY          # in a dollar quote
    S_BODY_TAG      # behind a dollar in it
    S_LINE          # in a comment to the end of the line
    S_BLOCK, S_BLOCK_STAR, S_BLOCK_SLASH
    S_DOT           # behind a dot: the token, or a number's first byte
    S_PARAMETER     # numbers, from here on
    S_ZERO, S_INTEGER, S_FRACTION
    S_EXPONENT_FIRST, S_EXPONENT_SIGN, S_EXPONENT
    S_RADIX_FIRST, S_RADIX

cdef enum:  # CLASS, what a byte may begin
    C_MARK, C_SPACE, C_NEWLINE, C_LETTER, C_DIGIT, C_OPERATOR, C_QUOTE
    C_DOUBLE_QUOTE, C_DOLLAR, C_DOT, C_SEMICOLON

cdef enum:
    PIECE = 8    # bytes of an operator; the pieces of longer ones are tokens
    SLOTS = 512  # of the keyword table

cdef uint8_t CLASS[256]
cdef uint8_t LOWER[256]       # bytes of names in lower case; 0 for others
cdef uint64_t KEYS[SLOTS]     # the value of the name; 0 where the slot is free
cdef Keyword KEYWORDS[SLOTS]

# The tag of a dollar quote has any length, so its hash is kept; with a key of the
# process, lest somebody makes another tag that seems to end the text.
cdef uint64_t TAG_KEY = int.from_bytes(urandom(8), "little")


cdef inline const Keyword* find(uint64_t value) noexcept nogil:
    cdef uint32_t slot = <uint32_t> (value >> 55)
    while KEYS[slot]:
        if KEYS[slot] == value:
            return &KEYWORDS[slot]
        slot = (slot + 1) & (SLOTS - 1)
    return NULL


cdef inline void begin(Scan* s, uint8_t state, uint64_t seed) noexcept nogil:
    s.state = state
    s.name = seed
    s.word = 0
    s.length = 0


cdef inline void push(Scan* s, uint8_t c) noexcept nogil:
    s.word |= <uint64_t> c << ((s.length & 7) << 3)
    s.length += 1
    if s.length & 7 == 0:
        s.name = mix(s.name, s.word)
        s.word = 0


cdef inline void end_name(Scan* s, bint is_quoted) noexcept nogil:
    s.state = S_GROUND
    take_name(s, name_value(s.name, s.word, s.length), is_quoted)


cdef void take_name(Scan* s, uint64_t value, bint is_quoted) noexcept nogil:
    cdef const Keyword* keyword = find(value)
    if keyword and keyword.word < W_PG_TEMP:
        if is_quoted or s.previous == W_DOT:
            keyword = NULL
        elif keyword.word == W_CONSTANT and (
            s.previous not in (W_IS, W_NOT, W_AS)
        ):
            take(s, LITERAL, NULL, T_LITERAL)
            return
    take(s, value, keyword, T_NAME)


cdef void end_operator(Scan* s) noexcept nogil:
    # A sign can't end an operator of the standard's characters: a=-1.
    cdef uint32_t length = s.length
    cdef uint8_t c
    s.state = S_GROUND
    if not s.has_special:
        while length > 1:
            c = s.word >> ((length - 1) << 3)
            if c != b"+" and c != b"-":
                break
            length -= 1
    if length:
        take_operator(s, s.word & (<uint64_t> -1 >> (64 - (length << 3))), length)
    while length < s.length:
        c = s.word >> (length << 3)
        take_operator(s, c, 1)
        length += 1


# Bytes. Each function takes what it can of its state, at least one byte or the
# way to another state, and returns where it stopped.

cdef const uint8_t* in_ground(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint64_t word, stop
    cdef uint32_t length
    cdef uint8_t c, kind
    while p < end:
        c = p[0]
        kind = CLASS[c]
        if kind == C_SPACE:
            p += 1
        elif kind == C_LETTER:
            word = 0
            stop = HIGH
            if end - p >= OCTETS:
                word = load(p)
                stop = not_of_names(word)
                if stop and count_before(stop) > 1:
                    length = count_before(stop)
                    p += length + (<uint8_t> (word >> (length << 3)) == b" ")
                    word = keep_before(lower(word), stop)
                    take_name(s, name_value(SEED_NAME, word, length), False)
                    continue
            begin(s, S_NAME, SEED_NAME)
            if not stop:
                s.name = mix(SEED_NAME, lower(word))
                s.length = OCTETS
                p += OCTETS
            p = in_name(s, p, end)
            if s.state != S_GROUND:
                return p
        elif kind == C_MARK:
            take_mark(s, c)
            p += 1
            if p < end:
                p += p[0] == b" "
        elif kind == C_OPERATOR:
            if p + 1 < end and CLASS[p[1]] != C_OPERATOR:
                take_operator(s, c, 1)
                p += 1
                continue
            begin(s, S_OPERATOR, 0)
            s.has_special = 0
            return p
        elif kind == C_DIGIT:
            take(s, LITERAL, NULL, T_NUMBER)
            if end - p >= OCTETS:
                stop = no_digits(load(p))
                if stop:
                    kind = CLASS[p[count_before(stop)]]
                    if kind != C_LETTER and kind != C_DOT:
                        p += count_before(stop)
                        continue
            s.state = S_ZERO if c == b"0" else S_INTEGER
            p = in_number(s, p + 1, end)
            if s.state != S_GROUND:
                return p
        elif kind == C_DOUBLE_QUOTE:
            begin(s, S_QUOTED, SEED_NAME)
            p = in_quoted(s, p + 1, end)
            if s.state != S_GROUND:
                return p
        elif kind == C_QUOTE:
            # 'a' and 'b' on the next line are one string, of one kind.
            if s.string and s.has_newline:
                s.state = s.string
            else:
                take(s, LITERAL, NULL, T_LITERAL)
                s.state = S_STRING
            p = in_string(s, p + 1, end)
            if s.state != S_GROUND:
                return p
        elif kind == C_NEWLINE:
            s.has_newline = 1
            p += 1
        elif kind == C_SEMICOLON:
            if s.depth or s.body:
                take(s, c, NULL, T_OTHER)
                s.previous = W_SEMICOLON
            else:
                end_statement(s)
            p += 1
        elif kind == C_DOT:
            if p + 1 == end or CLASS[p[1]] == C_DIGIT:
                s.state = S_DOT
                return p + 1
            take_dot(s)
            p += 1
        else:
            s.state = S_DOLLAR
            p += 1
            if p == end:
                return p
            p = in_dollar(s, p, end)
            if s.state != S_GROUND:
                return p
    return p


cdef const uint8_t* in_name(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint64_t name = s.name
    cdef uint64_t word = s.word
    cdef uint64_t stop = 0
    cdef uint32_t length = s.length
    cdef uint8_t c = 1
    while end - p >= OCTETS and length & 7 == 0:
        word = load(p)
        stop = not_of_names(word)
        word = lower(word)
        if stop:
            word = keep_before(word, stop)
            length += count_before(stop)
            p += count_before(stop)
            break
        name = mix(name, word)
        word = 0
        length += OCTETS
        p += OCTETS
    while not stop:
        if p == end:
            s.name = name
            s.word = word
            s.length = length
            return p
        c = LOWER[p[0]]
        if c == 0:
            break
        word |= <uint64_t> c << ((length & 7) << 3)
        length += 1
        p += 1
        if length & 7 == 0:
            name = mix(name, word)
            word = 0
    s.state = S_GROUND
    if length == 1:
        c = p[0]
        if c == b"'" and <uint8_t> word in b"ebxn":
            take(s, LITERAL, NULL, T_LITERAL)
            s.state = S_ESCAPE if word == b"e" else S_STRING
            return p + 1
        if c == b"&" and word == b"u":
            s.state = S_UNICODE
            return p + 1
    take_name(s, name_value(name, word, length), False)
    return p


cdef const uint8_t* in_operator(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint8_t c, last
    while p < end:
        c = p[0]
        if CLASS[c] != C_OPERATOR:
            end_operator(s)
            return p
        if s.length:
            last = s.word >> ((s.length - 1) << 3)
            if (c == b"-" and last == b"-") or (c == b"*" and last == b"/"):
                s.length -= 1
                end_operator(s)
                if c == b"-":
                    s.state = S_LINE
                else:
                    s.state = S_BLOCK
                    s.comments = 1
                    s.string = 0
                return p + 1
            if s.length == PIECE:
                end_operator(s)
                begin(s, S_OPERATOR, 0)
                s.has_special = 0
        s.word |= <uint64_t> c << (s.length << 3)
        s.length += 1
        if c in b"~!@#%^&|`?":
            s.has_special = 1
        p += 1
    return p


cdef const uint8_t* in_string(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint8_t state = s.state
    cdef uint8_t c
    while p < end:
        if state == S_STRING or state == S_ESCAPE:
            p = first_of(p, end, b"'", b"'" if state == S_STRING else b"\\")
            if p == end:
                break
            state = S_ESCAPE_SLASH if p[0] != b"'" else state + 1
            p += 1
            continue
        c = p[0]
        if state == S_ESCAPE_SLASH:
            p += 1
            state = S_ESCAPE
        elif c == b"'":
            p += 1
            state -= 1
        else:
            s.string = state - 1
            s.has_newline = 0
            state = S_GROUND
            break
    s.state = state
    return p


cdef const uint8_t* in_quoted(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint64_t word, stop
    while p < end and s.state == S_QUOTED:
        if end - p < OCTETS or s.length & 7:
            if p[0] == b'"':
                s.state = S_QUOTED_QUOTE
            else:
                push(s, p[0])
            p += 1
            continue
        word = load(p)
        stop = places_of(word, b'"')
        if stop:
            s.word = keep_before(word, stop)
            s.length += count_before(stop)
            s.state = S_QUOTED_QUOTE
            p += count_before(stop) + 1
        else:
            s.name = mix(s.name, word)
            s.length += OCTETS
            p += OCTETS
    if p == end:
        return p
    if s.state == S_QUOTED_QUOTE:
        if p[0] == b'"':
            push(s, p[0])
            s.state = S_QUOTED
            return p + 1
        end_name(s, True)
        return p
    # S_UNICODE
    if p[0] == b"'":
        take(s, LITERAL, NULL, T_LITERAL)
        s.state = S_STRING
        return p + 1
    if p[0] == b'"':
        begin(s, S_QUOTED, SEED_UNICODE)
        return p + 1
    begin(s, S_NAME, SEED_NAME)
    push(s, b"u")
    end_name(s, False)
    return resume_operator(s, b"&", p)


cdef inline const uint8_t* resume_operator(
    Scan* s, uint8_t c, const uint8_t* p
) noexcept nogil:
    begin(s, S_OPERATOR, 0)
    s.word = c
    s.length = 1
    s.has_special = c == b"&"
    return p


cdef const uint8_t* in_dollar(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint8_t c = p[0]
    if s.state == S_BODY:
        p = first_of(p, end, b"$", b"$")
        if p == end:
            return p
        s.state = S_BODY_TAG
        s.candidate = TAG_KEY
    elif s.state == S_BODY_TAG:
        if c == b"$":
            if s.candidate == s.tag:
                s.state = S_GROUND
            s.candidate = TAG_KEY
        elif LOWER[c]:
            s.candidate = mix(s.candidate, c)
        else:
            s.state = S_BODY
    elif s.state == S_DOLLAR and CLASS[c] == C_DIGIT:
        take(s, LITERAL, NULL, T_LITERAL)
        s.state = S_PARAMETER
        return in_number(s, p + 1, end)
    elif s.state == S_DOLLAR and CLASS[c] == C_LETTER:
        begin(s, S_TAG, SEED_NAME)
        s.tag = TAG_KEY
        return p
    elif c == b"$":
        if s.state == S_DOLLAR:
            s.tag = TAG_KEY
        take(s, LITERAL, NULL, T_LITERAL)
        s.state = S_BODY
    elif s.state == S_TAG and LOWER[c]:
        s.tag = mix(s.tag, c)
        push(s, LOWER[c])
    else:
        # No quote after all: a stray dollar, and perhaps a name behind it.
        s.state = S_NAME if s.state == S_TAG else S_GROUND
        take_mark(s, b"$")
        return p
    return p + 1


cdef const uint8_t* in_number(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    # The literal was taken at its first byte; here is found where it ends.
    cdef uint8_t state = s.state
    cdef uint8_t c, letter
    cdef bint is_digit
    if state == S_INTEGER or state == S_FRACTION or state == S_PARAMETER:
        while p < end and CLASS[p[0]] == C_DIGIT:
            p += 1
    if p == end:
        return p
    c = p[0]
    letter = LOWER[c]
    is_digit = CLASS[c] == C_DIGIT
    if state == S_ZERO:
        s.word = letter
        s.state = S_RADIX_FIRST if letter in b"xob" else S_INTEGER
        return p + (s.state == S_RADIX_FIRST)
    if is_digit or (c == b"_" and state != S_PARAMETER):
        if state == S_EXPONENT_FIRST or state == S_EXPONENT_SIGN:
            s.state = S_EXPONENT
        elif state == S_RADIX_FIRST:
            s.state = S_RADIX
        return p + 1
    if state == S_INTEGER and c == b".":
        s.state = S_FRACTION
        return p + 1
    if (state == S_INTEGER or state == S_FRACTION) and letter == b"e":
        s.word = letter
        s.state = S_EXPONENT_FIRST
        return p + 1
    if state >= S_RADIX_FIRST and b"a" <= letter <= b"f":
        s.state = S_RADIX
        return p + 1
    if state == S_EXPONENT_FIRST and c in b"+-":
        s.candidate = c
        s.state = S_EXPONENT_SIGN
        return p + 1
    s.state = S_GROUND
    if state in (S_EXPONENT_FIRST, S_EXPONENT_SIGN, S_RADIX_FIRST):
        # The letter begins a name, as servers before version 15 read `1else`.
        letter = s.word
        begin(s, S_NAME, SEED_NAME)
        push(s, letter)
        if state == S_EXPONENT_SIGN:
            end_name(s, False)
            return resume_operator(s, s.candidate, p)
    return p


cdef const uint8_t* in_comment(
    Scan* s, const uint8_t* p, const uint8_t* end
) noexcept nogil:
    cdef uint8_t c
    if s.state == S_LINE:
        p = first_of(p, end, b"\n", b"\r")
        if p < end:
            s.state = S_GROUND
        return p
    if s.state == S_BLOCK:
        p = first_of(p, end, b"*", b"/")
        if p == end:
            return p
    c = p[0]
    if s.state == S_BLOCK_STAR and c == b"/":
        s.comments -= 1
        s.state = S_BLOCK if s.comments else S_GROUND
    elif s.state == S_BLOCK_SLASH and c == b"*":
        s.comments += 1
        s.state = S_BLOCK
    else:
        s.state = (
            S_BLOCK_STAR if c == b"*" else S_BLOCK_SLASH if c == b"/" else S_BLOCK
        )
    return p + 1


cdef void scan_start(Scan* s) noexcept nogil:
    s.fingerprint = 0
    s.statements = 0
    s.free_statements = 0
    s.complexity = 100
    s.flags = 0
    s.kind = KIND_EMPTY
    s.state = S_GROUND
    s.has_newline = 0
    s.hash = SEED_HASH
    renew(s)


cdef void scan_feed(Scan* s, const char* text, Py_ssize_t size) noexcept nogil:
    cdef const uint8_t* p = <const uint8_t*> text
    cdef const uint8_t* end = p + size
    cdef uint8_t state
    while p < end:
        state = s.state
        if state == S_GROUND:
            p = in_ground(s, p, end)
        elif state == S_NAME:
            p = in_name(s, p, end)
        elif state == S_OPERATOR:
            p = in_operator(s, p, end)
        elif state >= S_PARAMETER:
            p = in_number(s, p, end)
        elif state >= S_LINE and state <= S_BLOCK_SLASH:
            p = in_comment(s, p, end)
        elif state == S_DOT:
            if CLASS[p[0]] == C_DIGIT:
                take(s, LITERAL, NULL, T_NUMBER)
                s.state = S_FRACTION
            else:
                take_dot(s)
                s.state = S_GROUND
        elif state >= S_DOLLAR:
            p = in_dollar(s, p, end)
        elif state >= S_STRING:
            p = in_string(s, p, end)
        else:
            p = in_quoted(s, p, end)


cdef void scan_finish(Scan* s) noexcept nogil:
    if s.state == S_NAME:
        end_name(s, False)
    elif s.state == S_QUOTED:
        end_name(s, True)
    elif s.state not in (S_GROUND, S_PARAMETER, S_INTEGER):
        scan_feed(s, b" ", 1)  # ends any other token
    end_statement(s)
    s.fingerprint = mix(s.hash, s.statements) or 1


include "_tables.pxi"


# For Python: tests, tools and the gateways.

def scan(bytes sql, cuts=()):
    cdef Scan s
    cdef const char* text = sql
    cdef Py_ssize_t start = 0
    cdef Py_ssize_t cut
    scan_start(&s)
    for cut in [*cuts, len(sql)]:
        if not start <= cut <= len(sql):
            raise ValueError(f"{cut} is not a place to cut")
        scan_feed(&s, text + start, cut - start)
        start = cut
    scan_finish(&s)
    return ScanResult(
        s.fingerprint, s.statements, s.free_statements, s.complexity,
        Flag(s.flags), Kind(s.kind),
    )


def fingerprint(sql):
    cdef Scan s
    cdef bytes text = sql.encode() if isinstance(sql, str) else sql
    scan_start(&s)
    scan_feed(&s, text, len(text))
    scan_finish(&s)
    return s.fingerprint
