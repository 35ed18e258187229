# Eight bytes of text at once, as one number whose lowest byte comes first.
#
# Places are told by a number in which such bytes have their highest bit set. Of
# `places_of` only the first is certain: a byte behind it may be taken for one more.
# (H. S. Warren, "Hacker's Delight", 6-1; S. E. Anderson, "Bit Twiddling Hacks".)

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define EACH 0x0101010101010101ULL
    #define HIGH 0x8080808080808080ULL
    """
    const uint64_t EACH
    const uint64_t HIGH
    int __builtin_ctzll(unsigned long long places) nogil

cdef enum:
    OCTETS = 8


cdef inline uint64_t load(const uint8_t* p) noexcept nogil:
    # Compilers make one instruction of it where bytes lie in this order.
    return (
        <uint64_t> p[0] | <uint64_t> p[1] << 8
        | <uint64_t> p[2] << 16 | <uint64_t> p[3] << 24
        | <uint64_t> p[4] << 32 | <uint64_t> p[5] << 40
        | <uint64_t> p[6] << 48 | <uint64_t> p[7] << 56
    )


cdef inline uint64_t places_of(uint64_t word, uint8_t c) noexcept nogil:
    word ^= EACH * c
    return (word - EACH) & ~word & HIGH


cdef inline uint32_t count_before(uint64_t places) noexcept nogil:
    """How many bytes come before the first of some places."""
    return __builtin_ctzll(places) >> 3


cdef inline uint64_t keep_before(uint64_t word, uint64_t places) noexcept nogil:
    """The bytes before the first of some places, and zeros."""
    return word & (((places & -places) >> 7) - 1)


cdef inline uint64_t between(uint64_t word, uint8_t a, uint8_t z) noexcept nogil:
    """Places of ASCII's a to z; whatever in bytes that are not ASCII's."""
    word &= ~HIGH
    return word + EACH * (128 - a) & ~(word + EACH * (127 - z))


cdef inline uint64_t letters(uint64_t word) noexcept nogil:
    return between(word | EACH * 0x20, b"a", b"z") & ~word & HIGH


cdef inline uint64_t lower(uint64_t word) noexcept nogil:
    """ASCII's letters in lower case, and all else as it is."""
    return word | letters(word) >> 2


cdef inline uint64_t not_of_names(uint64_t word) noexcept nogil:
    """Places of all but letters, digits, _, $ and bytes that are not ASCII's."""
    return HIGH & ~(
        word
        | letters(word)
        | between(word, b"0", b"9")
        | between(word, b"_", b"_")
        | between(word, b"$", b"$")
    )


cdef inline uint64_t no_digits(uint64_t word) noexcept nogil:
    return HIGH & (word | ~between(word, b"0", b"9"))


cdef inline const uint8_t* first_of(
    const uint8_t* p, const uint8_t* end, uint8_t one, uint8_t other
) noexcept nogil:
    """The first byte that is one or the other, or the end."""
    cdef uint64_t word, places
    while end - p >= OCTETS:
        word = load(p)
        places = places_of(word, one) | places_of(word, other)
        if places:
            return p + count_before(places)
        p += OCTETS
    while p < end and p[0] != one and p[0] != other:
        p += 1
    return p
