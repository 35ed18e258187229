"""Slow, plain twins of the compiled parts: the oracles of the property tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from ogelproxy._fingerprint import Flag, Kind, ScanResult


def cut(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Cut messages off `data`: their types and bodies, and what is left."""
    messages = []
    while len(data) >= 5:
        size = 1 + int.from_bytes(data[1:5], "big")
        if len(data) < size:
            break
        messages.append((data[:1], data[5:size]))
        data = data[size:]
    return messages, data


class TokenBucket:
    """A token bucket without leases, a queue and modes."""

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate = rate
        self.capacity = self.level = capacity
        self.stamp = now

    def take(self, now: float, count: int) -> bool:
        """Take `count` tokens, or none."""
        if now > self.stamp:
            minted = (now - self.stamp) * self.rate
            self.level = min(self.capacity, self.level + minted)
            self.stamp = now
        if count > self.level:
            return False
        self.level -= count
        return True


class UsageTwin:
    """The usage table as dicts: rows by (payer, fingerprint), one dict per batch.

    Has no bounds, so it agrees with the table while that isn't full.
    """

    def __init__(self, work_mem_bytes: float) -> None:
        self._work_mem_bytes = work_mem_bytes
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}

    def record(
        self, payer: int, fingerprint: int, sqlstate: bytes | None, **measure: Any
    ) -> None:
        """Count one measure, named as in ``UsageTable.record``."""
        complexity = measure.pop("complexity") / 100
        parallelism = 2 if measure["rows"] > 1000 else 1
        duration = measure["server_seconds"]
        memory = (self._work_mem_bytes + measure["bytes_out"]) / 2**30
        measure["vcpu_seconds"] = duration * complexity * parallelism
        measure["memory_gib_seconds"] = duration * memory
        measure["errors"] = sqlstate is not None
        row = self._rows.setdefault((payer, fingerprint), {})
        for name, value in measure.items():
            row[name] = row.get(name, 0) + value
        row["longest_seconds"] = max(row.get("longest_seconds", 0), duration)
        row["sqlstate"] = sqlstate.decode() if sqlstate else row.get("sqlstate", "")

    def rotate(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the batch's rows, and begin anew."""
        rows, self._rows = self._rows, {}
        return rows


# SQL. The twin sees the whole text at once, cuts it by regular expressions and
# asks its questions of each statement's words joined by spaces.


class Token(NamedTuple):
    """`word` is what questions are asked of, `folded` what the hash is made of."""

    word: str
    folded: int
    is_name: bool = False


LEXER = re.compile(
    r"""
    (?P<space>   [ \t\n\r\f\v]+ | --[^\n\r]* )
  | (?P<block>   /\* )
  | (?P<escape>  [eE]'(?:[^'\\]|\\.|'')*(?:'|\\?\Z) )
  | (?P<string>  (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*(?:'|\Z) )
  | (?P<quoted>  (?:[uU]&)?"(?:[^"]|"")*(?:"|\Z) )
  | (?P<dollar>  \$(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)?\$ )
  | (?P<param>   \$[0-9]+ )
  | (?P<number>  0[xXoObB][0-9a-fA-F_]+
               | (?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9_]+)? )
  | (?P<name>    [A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]* )
  | (?P<operator>[~!@\#^&|`?+\-*/%<>=]+ )
  | (?P<mark>    . )
    """,
    re.VERBOSE | re.DOTALL,
)
CONTINUED = {
    "string": re.compile(r"'(?:[^']|'')*(?:'|\Z)", re.DOTALL),
    "escape": re.compile(r"'(?:[^'\\]|\\.|'')*(?:'|\\?\Z)", re.DOTALL),
}
GAP = re.compile(r"(?:[ \t\n\r\f\v]|--[^\n\r]*(?=[\n\r]))*")

LITERAL = 63
FUNCTIONS = frozenset(
    "pg_temp pg_settings set_config pg_advisory_lock pg_advisory_lock_shared "
    "pg_try_advisory_lock pg_try_advisory_lock_shared pg_advisory_unlock "
    "pg_advisory_unlock_shared pg_advisory_unlock_all".split()
)
OPERANDS = frozenset(
    "all and between case default distinct else from having limit not offset on or "
    "returning select then to using when where".split()
)
LEADS = {
    "BEGIN": "begin start",
    "COMMIT": "commit end",
    "ROLLBACK": "rollback abort",
    "SAVEPOINT": "savepoint release",
    "SET": "set reset",
    "SELECT": "select table values with",
    "FETCH": "fetch move",
    "LISTEN": "listen unlisten",
    "CALL": "call do",
    "DDL": "create alter drop truncate comment grant revoke security import reassign",
    "MAINTAIN": "vacuum analyze analyse reindex cluster refresh checkpoint",
} | {
    name.upper(): name
    for name in "show copy insert update delete merge prepare execute deallocate "
    "declare close notify discard load lock explain".split()
}
KIND_OF = {word: kind for kind, words in LEADS.items() for word in words.split()}
FREE = re.compile(
    r" (?:(?:commit|end|abort|rollback)(?: work| transaction)?(?: and(?: no)? chain)?"
    r"|rollback(?: work| transaction)? to (?:savepoint )?N) "
)


def mix(value: int, other: int) -> int:
    """One step of the fingerprint's hash."""
    rotated = (value << 23 | value >> 41) & 2**64 - 1
    product = (rotated ^ other) * 0x9E3779B97F4A7C15 & 2**64 - 1
    return product ^ product >> 32


def _hash_bytes(seed: int, text: bytes) -> int:
    length = len(text)
    text += bytes(8 - length % 8)
    *blocks, rest = (
        int.from_bytes(text[at : at + 8], "little") for at in range(0, len(text), 8)
    )
    for block in blocks:
        seed = mix(seed, block)
    return mix(seed + (length << 16), rest)


def _lower(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)


def _operators(run: str) -> Iterator[str]:
    for at in range(0, len(run), 8):
        piece = run[at : at + 8]
        core = piece
        if not set(piece) & set("~!@#%^&|`?"):
            core = piece[0] + piece[1:].rstrip("+-")
            if core[-1] in "+-" and len(core) > 1:
                core = piece[0]
        yield core
        yield from piece[len(core) :]


def _token(kind: str, text: str, before: str) -> Token:
    """`before` is the word of the token before, in the same statement."""
    if kind in ("escape", "string", "dollar", "param"):
        return Token("L", LITERAL)
    if kind == "number":
        return Token("0", LITERAL)
    if kind == "operator":
        folded = "<>" if text == "!=" else text
        seed = mix(0x104 + len(text), int.from_bytes(folded.encode(), "little"))
        return Token(text, seed)
    if kind == "mark":
        return Token(text, ord(text))
    if kind == "quoted":
        seed = 0x102 if text[0] == '"' else 0x103
        name = text[text.index('"') + 1 :]
        if len(re.findall('"', name)) % 2:
            name = name[:-1]
        name = name.replace('""', '"')
        known = name in FUNCTIONS and seed == 0x102
        return Token(
            name if known else '"', _hash_bytes(seed, name.encode("latin-1")), True
        )
    name = _lower(text)
    if name in ("null", "true", "false") and before not in ("is", "not", "as", "."):
        return Token("L", LITERAL)
    known = before != "." or name in FUNCTIONS
    word = name if known and re.fullmatch(r"[a-z0-9_]+", name) else '"'
    return Token(word, _hash_bytes(0x102, name.encode("latin-1")), True)


def _lex(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = LEXER.match(text, at)
        assert match is not None
        kind, found = str(match.lastgroup), match[0]
        at = match.end()
        if kind == "block":
            depth = 1
            while depth and at < len(text):
                pair = text[at : at + 2]
                depth += {"/*": 1, "*/": -1}.get(pair, 0)
                at += 2 if pair in ("/*", "*/") else 1
        elif kind == "dollar":
            end = text.find(found, at)
            at = len(text) if end < 0 else end + len(found)
            yield kind, found
        elif kind == "operator":
            cut = re.search(r"--|/\*", found)
            if cut:
                at -= len(found) - cut.start()
                found = found[: cut.start()]
            for operator in _operators(found):
                yield kind, operator
        elif kind in CONTINUED:
            yield kind, found
            while gap := GAP.match(text, at):
                more = CONTINUED[kind].match(text, gap.end())
                if not (more and re.search(r"[\n\r]", gap[0])):
                    break
                at = more.end()
        elif kind != "space":
            yield kind, found


@dataclass
class Frame:
    """A list being read, or, at depth -1, the statement itself."""

    depth: int
    is_rows: bool = False
    elements: list[list[Any]] = field(default_factory=list)
    current: list[Any] = field(default_factory=list)

    def end_element(self) -> None:
        if not self.elements or self.elements[-1] != self.current:
            self.elements.append(self.current)
        self.current = []


class Statement:
    """The tokens of one statement, and where an operand may stand."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.operands: list[bool] = []  # whether one may follow each token
        self.depth = 0
        self.body = 0  # BEGIN ATOMIC and the CASEs open in it

    def before(self, count: int = 1) -> str:
        """The word `count` tokens ago."""
        return self.tokens[-count].word if len(self.tokens) >= count else ""

    def add(self, kind: str, text: str) -> None:
        token = _token(kind, text, self.before())
        word = token.word
        may = bool(self.operands and self.operands[-1])
        if self.depth == 0 and self.body:
            self.body += word == "case" and may and self.before() != "between"
            self.body -= word == "end" and self.before() != "as"
        elif self.depth == 0 and word == "atomic" and self.before() == "begin":
            self.body = int(self._is_routine())
        self.depth += word in ("(", "[")
        self.depth = max(0, self.depth - (word in (")", "]")))
        follows = kind == "operator" or word in OPERANDS or word in ("(", "[", ",", ":")
        follows |= word == "by" and self.before() in ("order", "group")
        follows |= word == "return" and self.before() in ("atomic", ";")
        self.tokens.append(token)
        self.operands.append(follows)

    def _is_routine(self) -> bool:
        words = self._lead()
        return words[:1] == ["create"] and any(
            pair[0] in ("create", "replace") and pair[1] in ("function", "procedure")
            for pair in pairwise(words)
        )

    def _lead(self) -> list[str]:
        words = [token.word for token in self.tokens]
        while words and words[0] == "(":
            del words[0]
        return words

    def questions(self) -> tuple[str, int, int, bool]:
        """Kind, flags, complexity in hundredths, whether it is free."""
        words = self._lead()
        names = [
            token.is_name for token in self.tokens[len(self.tokens) - len(words) :]
        ]
        kind = KIND_OF.get(words[0] if words else "", "OTHER")
        # A comma in a list, which no right statement has so early, is no token.
        opens = ("[", "to", "=") if words[:1] == ["set"] else ("[",)
        while words[2:3] == [","] and words[1] in opens:
            del words[2], names[2]
        text = f" {' '.join(words)} "
        flags = set(_flags(words, names, text, kind))
        free = list(words)
        if len(words) > 2 and "to" in words[:3] and names[-1]:
            if words[-2] in ("to", "savepoint"):
                free[-1] = "N"
        is_free = FREE.fullmatch(f" {' '.join(free)} ") is not None
        return kind, sum(Flag[flag] for flag in flags), self._complexity(kind), is_free

    def _complexity(self, kind: str) -> int:
        text = " ".join(token.word for token in self.tokens)
        text = f" {text.removeprefix('( ' * (len(self.tokens) - len(self._lead())))} "
        text = text.replace(" ", "  ")
        weights = {
            r" (?:join|lateral) ": 50,
            r" \(  select ": 50,
            r" over ": 60,
            r" group  by ": 40,
            r" order  by ": 30,
            r"(?<! is )(?<! not ) distinct ": 30,
            r" (?:union|intersect|except) ": 30,
            r" having ": 10,
            r" with  recursive ": 100,
        }
        found = sum(len(re.findall(p, text)) * w for p, w in weights.items())
        found += {"DDL": 100, "CALL": 100, "MAINTAIN": 200}.get(kind, 0)
        return min(2000, 100 + found)


def _flags(words: list[str], names: list[bool], text: str, kind: str) -> Iterator[str]:
    lead, second, third, *_ = [*words, "", "", ""]
    if kind in ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT"):
        yield "TRANSACTION"
    if kind in ("DDL", "COPY", "EXECUTE", "DEALLOCATE", "CLOSE", "DISCARD", "LOAD"):
        yield kind
    if lead == "do":
        yield "OPAQUE"
    if kind == "LISTEN":
        yield lead.upper()
    if lead in ("commit", "abort", "rollback") and second == "prepared":
        yield "PREPARED_XACT"
    if lead == "prepare" and len(words) > 2:
        if second == "transaction" and third == "L":
            yield from ("PREPARED_XACT", "TRANSACTION")
        else:
            yield "PREPARE"
    roles = ("role", "session_authorization")
    if lead == "reset" and len(words) > 1:
        yield "SET"
        if second in (*roles, "session"):
            yield "ROLE"
    if lead == "set" and len(words) > 2:
        local = ("local", "global", "transaction", "constraints")
        is_role = second in roles or (
            second == "session" and third in (*roles, "authorization")
        )
        if second in local and names[2]:
            yield "SET_LOCAL"
        else:
            yield "SET"
            if is_role:
                yield "ROLE"
    if re.search(r" (create|replace|local|global|into) (temp|temporary) ", text):
        yield "TEMP"
    if " pg_temp " in text:
        yield "TEMP"
    if lead == "declare" and " with hold " in text:
        yield "HOLD"
    if " as execute " in text or (lead == "explain" and " execute " in text):
        yield "EXECUTE"
    if re.search(r" pg_(try_)?advisory_lock(_shared)? ", text):
        yield "ADVISORY"
    if re.search(r" pg_advisory_unlock(_shared|_all)? ", text):
        yield "ADVISORY_UNLOCK"
    if " set_config " in text or (lead == "update" and " pg_settings " in text):
        yield "SET_CONFIG"


def _close(frames: list[Frame]) -> None:
    inner = frames.pop()
    inner.end_element()
    frames[-1].current.append(inner.elements)


def _name_values(statement: Statement) -> tuple[list[Token], int]:
    """The tokens, names that are values as such, and where SET's list opens or -1."""
    tokens = list(statement.tokens)
    words = statement._lead()
    begin = len(tokens) - len(words)
    lead = words[0] if words else ""
    opens = -1
    marks = {"fetch": ("from", "in"), "move": ("from", "in"), "rollback": ("to",)}
    is_next = lead in ("savepoint", "release", "close", "deallocate", "declare")
    is_marked = False
    for at in range(begin + 1, len(tokens)):
        word, _, is_name = tokens[at]
        value = Token(word, LITERAL)
        if lead == "set":
            roles = ("role", "session_authorization", "authorization")
            if opens < 0 and word in ("to", "="):
                opens = at
                tokens[at] = _token("operator", "=", "")
            elif is_name and opens < 0:
                if tokens[at - 1].word in roles:
                    tokens[at] = value
            elif is_name and word not in ("all", "default", "savepoint", "prepare"):
                tokens[at] = value
        elif lead in marks and not is_marked:
            is_next = is_marked = word in marks[lead]
        elif is_next and is_name:
            if word not in ("all", "default", "savepoint", "prepare"):
                tokens[at] = value
                is_next = False
    return tokens, opens


def _form(statement: Statement) -> list[Any]:
    """The values to be hashed; a list of lists where a list has been folded."""
    frames = [Frame(-1)]
    depth = 0
    before = ""
    tokens, opens = _name_values(statement)
    for at, (word, folded, _) in enumerate(tokens):
        inner = frames[-1]
        if word == "," and inner.depth == depth:
            inner.end_element()
        elif word == "(" and before == "values" and len(frames) <= 8:
            frames.append(Frame(depth, is_rows=True, current=[folded]))
        elif (
            word in ("+", "-")
            and statement.operands[at - 1 : at] == [True]
            and [token.word for token in tokens[at + 1 : at + 2]] == ["0"]
        ):
            if inner.is_rows and inner.depth == depth:
                _close(frames)
        else:
            while word in (")", "]") and frames[-1].depth == depth:
                _close(frames)
            if frames[-1].is_rows and frames[-1].depth == depth and word != "(":
                _close(frames)
            frames[-1].current.append(folded)
        depth += word in ("(", "[")
        is_opened = word == "[" or (word == "(" and before == "in") or at == opens
        if is_opened and len(frames) <= 8:
            frames.append(Frame(depth))
        depth = max(0, depth - (word in (")", "]")))
        before = word
    while len(frames) > 1:
        _close(frames)
    return frames[0].current


def _hash(seed: int, form: list[Any]) -> int:
    for value in form:
        if isinstance(value, list):
            for element in value:
                seed = mix(seed, _hash(0x105, element))
        else:
            seed = mix(seed, value)
    return seed


def scan(sql: bytes) -> ScanResult:
    """What the compiled scan should say of `sql`."""
    statements = [Statement()]
    for kind, text in _lex(sql.decode("latin-1")):
        last = statements[-1]
        if text == ";" and kind == "mark" and not last.depth and not last.body:
            statements.append(Statement())
        else:
            last.add(kind, text)
    statements = [statement for statement in statements if statement.tokens]
    value = 0x101
    for at, statement in enumerate(statements):
        value = _hash(mix(value, ord(";")) if at else value, _form(statement))
    answers = [statement.questions() for statement in statements]
    flags = 0
    for answer in answers:
        flags |= answer[1]
    return ScanResult(
        mix(value, len(statements)) or 1,
        len(statements),
        sum(answer[3] for answer in answers),
        max([100, *(answer[2] for answer in answers)]),
        Flag(flags),
        Kind[answers[0][0]] if answers else Kind.EMPTY,
    )
