"""Corpus: statements out of files that were written for psql.

Postgres's regression files lie in the source archive of `pglast`, which pip gets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from bench.case import ROOT

#: Small, and in the repository.
OWN = Path(__file__).parent / "statements"

_REGRESSION = "/libpg_query/test/sql/postgres_regress/"
_TOKEN = re.compile(
    r"""
    (?P<string> (?<!\w)[eE]'(?:[^'\\]|\\.|'')*' | '[^']*' | "[^"]*"
              | (?<!\w)(?P<tag>\$(?:[^\W\d]\w*)?\$).*?(?P=tag) )
  | (?P<comment> --[^\n]* )
  | (?P<block>   /\* )
  | (?P<mark>    [()] )
  | (?P<end>     ; | \\; | \\[^\n]* )  # a command of psql's takes the line
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_MARK = re.compile(r"/\*|\*/")
#: The body of a function, with semicolons of its own.
_OPEN_BODY = re.compile(r"\bbegin\s+atomic\b(?!.*\bend\s*\Z)", re.I | re.S)
_COPY_FROM_STDIN = re.compile(r"\bcopy\b.*\bfrom\s+stdin\b", re.I | re.S)
#: Files that prove COPY to be refused have none behind it.
_DATA = re.compile(r"[^\n]*\n(?:[^\n]+\n)*?\\\.(?:\n|\Z)")


def regression_files() -> list[str]:
    """Return the texts of Postgres's regression files; pip fetches them once.

    Raises CalledProcessError where it can't.
    """
    folder = ROOT / "build" / "corpus"
    wanted = f"pglast-{version('pglast')}"
    archive = folder / f"{wanted}.tar.gz"
    if not archive.exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--no-binary", "pglast", "--dest", str(folder)),
                wanted.replace("-", "=="),
            ],
            stdout=sys.stderr,
            check=True,
        )
    with tarfile.open(archive) as members:
        return [
            file.read().decode("utf-8", "replace")
            for member in sorted(members, key=lambda member: member.name)
            if _REGRESSION in member.name
            and member.name.endswith(".sql")
            and (file := members.extractfile(member)) is not None
        ]


def files_of(folder: Path) -> list[str]:
    """Return the texts of all *.sql files in a folder and those below."""
    return [
        path.read_text("utf-8", "replace") for path in sorted(folder.rglob("*.sql"))
    ]


def statements(files: Iterable[str]) -> list[str]:
    """Return the different statements of files, in the order of their first places."""
    return list(dict.fromkeys(each for text in files for each in cut(text)))


def cut(script: str) -> Iterator[str]:
    """Cut a script where psql would, and leave out what psql takes for itself.

    It need not be right: what is in error is for the server to refuse. With the
    texts come comments before them and inside; white space around is stripped.
    """
    begin = at = depth = 0
    while found := _TOKEN.search(script, at):
        kind, at = found.lastgroup, found.end()
        if kind == "block":
            at = _end_of_block(script, at)
        elif kind == "mark":
            depth = max(0, depth + (1 if found[0] == "(" else -1))
        elif kind == "end" and depth and found[0] == ";":
            continue
        elif kind == "end":
            statement = script[begin : found.start()].strip()
            if _OPEN_BODY.search(statement) and found[0] == ";":
                continue
            if statement:
                yield statement
            if _COPY_FROM_STDIN.search(statement) and (data := _DATA.match(script, at)):
                at = data.end()
            begin, depth = at, 0
    if rest := script[begin:].strip():
        yield rest


def _end_of_block(script: str, at: int) -> int:
    depth = 1
    while depth and (found := _BLOCK_MARK.search(script, at)):
        depth += 1 if found[0] == "/*" else -1
        at = found.end()
    return len(script) if depth else at
