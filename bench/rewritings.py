"""Rewritings: what libpg_query folds and the proxy does not, and the other way.

They work on the words of a statement as libpg_query's scanner finds them, and are
good enough to count by: no parser is behind them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from functools import lru_cache, partial

from pglast.parser import ParseError, fingerprint, scan

_LITERALS = frozenset(
    "ICONST FCONST SCONST BCONST XCONST USCONST PARAM NULL_P TRUE_P FALSE_P".split()
)
_COMMENTS = frozenset(("SQL_COMMENT", "C_COMMENT"))


@lru_cache(maxsize=1 << 16)
def words(statement: str) -> str:
    """Return the words in lower case with a space between, literals as `?`."""
    found = " ".join(
        "?"
        if token.name in _LITERALS
        else statement[token.start : token.end + 1].lower().strip('"')
        for token in scan(statement)
        if token.name not in _COMMENTS
    )
    return re.sub(r"(?<![\w?)\]\"]) [-+] \?", " ?", f" {found} ")


def without_comments(statement: str) -> str:
    """Return the text with a space where a comment is."""
    parts = []
    end = 0
    for token in scan(statement):
        if token.name in _COMMENTS:
            parts += [statement[end : token.start], " "]
            end = token.end + 1
    return "".join([*parts, statement[end:]]).strip()


_TYPE = r"(?:pg_catalog \. )?\w+(?: varying| precision| with(?:out)? time zone)?"
_SIZE = r"(?: \( [?, ]*\))?(?: \[ (?:\? )?\])*"
#: What stands before a literal as its type.
_TYPED = (
    r"(?:bit|bool|boolean|box|bytea|char|cidr|circle|date|float[48]|inet|int[248]|"
    r"interval|jsonb?|jsonpath|line|lseg|money|numeric|path|pg_lsn|point|polygon|"
    r"pg_snapshot|text|time(?:stamp)?(?:tz)?|txid_snapshot|uuid|varchar|xml)"
    r"(?: with(?:out)? time zone)?"
)
_FIELDS = r"(?: (?:year|month|day|hour|minute|second)(?: to \w+)?)?"

#: In order; each is applied to what those before have left.
_STEPS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "noise words and synonyms",
        (
            (r"^ (?:begin|start)(?: work| transaction)? ", " begin "),
            (r"^ (?:commit|end)(?: work| transaction)? ", " commit "),
            (r"^ (?:rollback|abort)(?: work| transaction)? ", " rollback "),
            (r"^ (release|rollback to) savepoint ", r" \1 "),
            (r"^ drop (?:user|group) ", " drop role "),
            (r"^ (fetch|move)( .*)? (?:from|in) ", r" \1\2 from "),
            (r" (inner|outer|left outer|right outer) join ", " join "),
            (r" != ", " <> "),
        ),
    ),
    (
        "what SET sets to",
        (
            (r"^ set (session |local )?([\w. ]+?) (?:=|to) .*$", r" set \1\2 = ? "),
            (r"^ set (session |local )?(role|session authorization) .*$", r" set \2 "),
        ),
    ),
    (
        "names of cursors, savepoints and prepared statements",
        (
            (r"^ (deallocate|close|savepoint|release|rollback to) \S+ ", r" \1 N "),
            (r"^ (fetch|move) (.* )?\S+ $", r" \1 \2N "),
            (r"^ declare \S+ ", " declare N "),
            (r"^ execute .*$", " execute "),
        ),
    ),
    (
        "names of roles",
        ((r"^ (\w+) (role|user|group) (if exists )?.*$", r" \1 \2 \3"),),
    ),
    (
        "casts and types of constants",
        (
            (rf" :: {_TYPE}{_SIZE}", ""),
            (rf" cast \( ([^()]*) as {_TYPE}{_SIZE} \)", r" \1"),
            (rf" {_TYPED}{_SIZE} \?{_FIELDS}", " ?"),
        ),
    ),
    (
        "labels of columns and tables",
        (
            (r" as (?:(?!(?:from|where|order|group|union) )[^(),])*", " "),
            (r"(?<=[?)]) (?!from|where)\w+ (?=$|, )", " "),
        ),
    ),
    (
        "words that its parser makes a constant of: EXTRACT, SUBSTRING, FETCH",
        (
            (r" extract \( \w+ from ", " extract ( ? , "),
            (r"(?<=\?) (?:from|for|similar|escape) (?=\?)", " , "),
            (r"^ (fetch|move) .*$", r" \1 "),
            (r"^ do .*$", " do "),
        ),
    ),
    (
        "how many and in which order: arguments, columns, tables, rows",
        (
            (r" - \?", " ?"),
            (r" \?(?: , \?)+", " ?"),
            (r" (\S+)(?: , \1)+(?= )", r" \1"),
        ),
    ),
)


def finer_than_libpg_query() -> list[tuple[str, Callable[[str], Hashable]]]:
    """Return what joins statements that only libpg_query has together."""
    names = [*(name for name, _ in _STEPS), "parentheses, and the order of all words"]
    return [(name, partial(_rewritten, last=at)) for at, name in enumerate(names)]


@lru_cache(maxsize=1 << 18)
def _rewritten(statement: str, last: int) -> Hashable:
    if last == len(_STEPS):
        return frozenset(str(_rewritten(statement, last - 1)).split()) - set("(),")
    text = str(_rewritten(statement, last - 1)) if last else words(statement)
    for pattern, by in _STEPS[last][1]:
        text = re.sub(pattern, by, text)
    return text


def coarser_than_libpg_query() -> list[tuple[str, Callable[[str], Hashable]]]:
    """Return what joins statements that only the proxy has together."""
    return [
        ("a sign before a number", _unsigned),
        ("values that no expression holds: options, labels, comments", _plain),
    ]


def _unsigned(statement: str) -> Hashable:
    return _fingerprint(
        re.sub(r"(?<![\w)\]'\"])(\s*)[-+]\s*(?=[\d.])", r"\1", statement)
    )


def _plain(statement: str) -> Hashable:
    """Return the words without literals, lists of them and signs, for a key."""
    text = re.sub(r"(?: [-+])? \?(?: , \?)*", " ?", words(statement))
    # A cursor has another name beside another number of rows.
    return re.sub(r"^ (fetch|move) (.* )?\S+ $", r" \1 \2N ", text)


def _fingerprint(statement: str) -> Hashable:
    try:
        return fingerprint(statement)
    except ParseError:
        return statement
