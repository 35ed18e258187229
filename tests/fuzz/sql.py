"""The SQL lexer: its slow twin says the same, wherever the text is cut."""

from __future__ import annotations

from ogelproxy._fingerprint import fingerprint, scan
from tests import reference
from tests.fuzz.targets import Target

SEEDS = (
    b"select 1",
    b"BEGIN; INSERT INTO t VALUES (1, E'it\\'s', $x$;$y$;$x$), (-2e-3, U&'d', $1)",
    b"/* ; /* ; */ ; */ SELECT * FROM \"A;\"\"B\" WHERE x IN (1,2) AND y->>'a'='b'",
    b"select 'a' -- ;\n'c'; COMMIT AND CHAIN",
    b"create or replace procedure p() begin atomic select case when true then 1 end;"
    b" end; select 2",
    b"create temp table t as execute p(0x1f, 1_000, .5e-1)",
    b"set local search_path = a; reset role; set session authorization 'b'",
    b"declare c cursor with hold for select distinct a, b from t join u using (a)"
    b" group by 1 order by 2 union select null is not null",
    b"rollback to savepoint a; prepare transaction 'x'; commit prepared 'x'",
    b"select pg_try_advisory_lock(1), set_config('a', 'b', false), a != -1, b|/*;*/-1",
    b"listen a; unlisten *; load 'x'; discard all; deallocate b; copy t to stdout",
)
WORDS = tuple(
    b"select from where values in not is null true as with recursive join lateral "
    b"group by order having distinct union over begin atomic case end between return "
    b"create replace function procedure temp temporary into local global commit "
    b"rollback abort work transaction and no chain to savepoint release prepare "
    b"prepared execute explain deallocate declare hold discard listen unlisten set "
    b"reset session role authorization session_authorization constraints set_config "
    b"update pg_settings pg_temp pg_advisory_lock pg_advisory_unlock_all copy load "
    b"/* */ -- $$ $a$ :: -> <> != e' E'\\' U&' u&\" x' '' \"\" \\' 0x 1e+ 1_0".split()
)


def run(text: bytes) -> None:
    found = scan(text)
    assert found == reference.scan(text)
    assert found == scan(text, range(len(text)))
    middle = len(text) // 2
    assert found == scan(text, [middle // 2, middle])
    assert fingerprint(text) == found.fingerprint != 0
    assert found.free_statements <= found.statements <= len(text)
    assert 100 <= found.complexity <= 2000


TARGETS = (Target("sql", run, SEEDS, WORDS, max_bytes=256),)
