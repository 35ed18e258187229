"""The compiled scan against its slow twin, against Postgres, and by example."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg import pq

import ogelproxy
from ogelproxy._fingerprint import Flag, Kind, fingerprint, scan
from tests import reference
from tests.fixtures.postgres import Postgres

#: What has a rule of its own in the scan, and what is only near to it.
WORDS = """
    select from where and or not in values insert into t a b temp temporary create
    replace function procedure begin atomic case end as commit abort rollback to
    savepoint work transaction and no chain prepared prepare execute explain set reset
    local session role authorization session_authorization constraints order by group
    over distinct is null true false union except join lateral having with recursive
    hold declare return between listen unlisten deallocate discard copy pg_advisory_lock
    pg_try_advisory_lock_shared pg_advisory_unlock_all set_config pg_temp pg_settings
    release close fetch move all default update SELECT Commit exactly8
    seventeen_letters nine_letters e E u U b x n
""".split()
MARKS = [
    *(
        "(",
        ")",
        "(",
        ")",
        "[",
        "]",
        ",",
        ";",
        ";",
        ".",
        ":",
        "::",
        "{",
        "}",
        "\\",
        "\0",
    ),
    *("+", "-", "*", "/", "=", "<>", "!=", "--", "/*", "*/", "=-", "+-+", "~-", "->>"),
    *(
        "& ",
        "&",
        "@>",
        "**********",
        "<<<<<<<--",
        "+++++++++",
        "|/*",
        "-- x\n",
        "/* */",
    ),
    *(" ", "\n", "\r\n", "\t", "'", "''", '"', '""', "$", "$$", "$a$", "$a", "$1$"),
    *(
        "'x'",
        "'it''s'",
        "E'a\\'b'",
        "e'",
        "b'1'",
        "x'f'",
        "n'y'",
        "u&'d'",
        'U&"d"',
        "u&",
    ),
    *('"a"', '"A""b"', '"pg_temp"', '"select"', "$1", "$12", "0", "1", "1.5", ".5"),
    *("1.", "1e5", "1E-5", "1e", "1e+", "0x1f", "0xg", "0b", "1_000", "été", "\xff"),
]
FRAGMENTS = st.sampled_from(WORDS * 2 + MARKS)
TEXTS = st.builds(
    lambda parts, gap: gap.join(parts).encode("latin-1"),
    st.lists(FRAGMENTS, max_size=40),
    st.sampled_from(["", " ", " "]),
)


@settings(max_examples=1500, deadline=None)
@given(TEXTS | st.binary(max_size=64), st.data())
@example(b"1e+--\n", None)
@example(b"select ''\n; '; a'", None)
@example(b"[[,[", None)
@example(b"set [ ,", None)
@example(b"(set role to , ) to = a", None)
def test_any_text_scans_as_its_twin_says_whole_or_in_pieces(
    text: bytes, data: st.DataObject | None
) -> None:
    expected = reference.scan(text)
    assert scan(text) == expected
    assert scan(text, range(len(text))) == expected
    if data is not None:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
        assert scan(text, cuts) == expected


def test_random_bytes_by_the_megabyte_scan_the_same_in_pieces() -> None:
    noise = random.Random(7)
    text = noise.randbytes(1 << 20)
    cuts = sorted(noise.randrange(len(text)) for _ in range(1000))
    assert scan(text) == scan(text, cuts)
    letters = bytes(noise.choice(b"ab'\"$/*-;()[] \n\\e1") for _ in range(1 << 18))
    assert scan(letters) == scan(letters, range(0, len(letters), 7))


def test_every_cut_of_a_long_text_gives_the_same_scan() -> None:
    text = (
        b"BEGIN; INSERT INTO t VALUES (1, E'it\\'s', $x$;$y$;$x$), (-2e-3, U&'d', $1);"
        b"/* ; /* ; */ ; */ SELECT * FROM \"A;\"\"B\" WHERE x IN (1,2) AND y->>'a'='b'"
        b"\n'c' -- ;\n; COMMIT AND CHAIN"
    )
    whole = scan(text)
    assert (whole.statements, whole.free_statements) == (4, 1)
    for cut in range(len(text) + 1):
        assert scan(text, [cut]) == whole


def test_a_place_to_cut_that_is_outside_is_refused() -> None:
    for cuts in ([9], [-1], [2, 1]):
        with pytest.raises(ValueError, match="not a place to cut"):
            scan(b"select 1", cuts)


ALIKE = [
    ("select 1", "SELECT  2"),
    ("select 1", "select 1;;  ; -- done"),
    ("select 1", "/* by /* me */ */ select\n-1"),
    ("select 'a'", "select 'it''s'"),
    ("select 'a'", r"select e'it\'s'"),
    ("select 'a'", "select $tag$ it's; $$ $tag$"),
    ("select 'a'", "select $1"),
    ("select 'a'", "select 'a'\n  'b'"),
    ("select 'a'", "select U&'d\\0061t'"),
    ("select x'1f'", "select b'01'"),
    ("select 1.5e-7", "select 0xFF"),
    ("select 1_000", "select .5"),
    ("select * from foo", 'SELECT * FROM "foo"'),
    ("select a from t where b = -1", "select a from t where b=-2"),
    (
        "select a from t where b between -1 and 1",
        "select a from t where b between 0 and 9",
    ),
    ("select a from t where b <> 1", "select a from t where b != 1"),
    ("select a from t where b in (1)", "select a from t where b IN (1, 2, 3)"),
    (
        "select a from t where b in ($1, $2)",
        "select a from t where b in ('x', -1, null)",
    ),
    ("select 1 where b in ('a'::uuid)", "select 1 where b in ('a'::uuid, 'b'::uuid)"),
    ("select 1 where (a, b) in ((1, 2))", "select 1 where (a, b) in ((1, 2), (3, 4))"),
    ("select a = any(array[1])", "select a = any(ARRAY[1, 2, 3])"),
    ("select array[[1]]", "select array[[1, 2], [3, 4]]"),
    ("insert into t values (1, 'a')", "insert into t values (1, 'a'), (2, null)"),
    ("insert into t values (1, now())", "insert into t values (1, now()), (2, now())"),
    (
        "insert into t values (array[1], 2) returning a",
        "insert into t values (array[1, 2], 2), (array[1, 2, 3], 2) returning a",
    ),
    ("select a from t limit 1", "select a from t limit 100"),
    ("update t set a = true", "update t set a = false"),
    ("update t set a = null", "update t set a = 'x'"),
    ("begin; select 1; commit", "BEGIN;;select 2;COMMIT;"),
    ("select été", "SELECT été"),
    ("savepoint a", 'SAVEPOINT "s140_x1"'),
    ("release savepoint a", "release savepoint b"),
    ("rollback to a", "rollback to b"),
    ("rollback work to savepoint a", "rollback work to savepoint b"),
    ("declare a cursor for select 1", 'declare "B" cursor for select 1'),
    ("fetch forward 10 from a", 'fetch forward 20 from "b"'),
    ("move 1 in a", "move 2 in b"),
    ("close a", "close b"),
    ("deallocate prepare a", "deallocate prepare b"),
    ("set search_path to a, public", "set search_path = b"),
    ("set search_path to a", "set search_path to 'a', \"b\", 'c'"),
    ("set x = on", "set x to 1"),
    ("set role a", "set role 'b'"),
    ("set local role to a", "set local role = b"),
    ("set session authorization a", "set session authorization b"),
    ("", " -- nothing\n;;"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_statements_of_one_shape_group(one: str, other: str) -> None:
    assert fingerprint(one) == fingerprint(other) != 0


UNLIKE = [
    ("select a", "select b"),
    ("select 1", "select 1, 2"),
    ("select a", "select 'a'"),
    ("select foo", 'select "Foo"'),
    ("select 'a'", 'select "a"'),
    ('select "a"', 'select U&"a"'),
    ("select f(1)", "select f(1, 2)"),
    ("select a - 1", "select a + 1"),
    ("select a -1", "select a"),
    ("select a where b is null", "select a where b is not null"),
    ("select a where b is null", "select a where b is true"),
    ("select a where b in (1)", "select a where b in (c)"),
    ("select a where b in (1)", "select a where b not in (1)"),
    ("select a where b in (c, d)", "select a where b in (c)"),
    ("insert into t values (1)", "insert into t values (1, 2)"),
    ("insert into t values (1, 2), (3, 4)", "insert into t values (1, 2), (3, now())"),
    ("select a, b from t", "select ab from t"),
    ("select ab", "select a b"),
    ("select a; select b", "select a select b"),
    ("select 1", "select 1; select 1"),
    ("a >= 1", "a > = 1"),
    ("a@-1", "a@ -1"),
    ("select été", "select ÉTÉ"),
    ("select nine_letters", "select nine_letterz"),
    ("select a, exactly8", "select a, exactly9"),
    ("savepoint a", "release a"),
    ("close a", "close all"),
    ("deallocate a", "deallocate all"),
    ("declare a cursor for select 1", "declare a cursor for select b"),
    ("fetch a from c", "fetch b from c"),
    ("set a = 1", "set b = 1"),
    ("set a = 1", "set local a = 1"),
    ("set a = 1", "set a to default"),
    ("set session authorization a", "set role a"),
    ("execute a(1)", "execute b(1)"),
    ("update t set a = b", "update t set a = c"),
    ("select 1 from a", "select 1 from b"),
    ("set a = 1; select a", "set a = 1; select b"),
    ("notify a", "notify b"),
]


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_statements_of_different_shapes_do_not_group(one: str, other: str) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_text_and_bytes_have_the_same_fingerprint() -> None:
    assert (
        fingerprint("select 'é'")
        == fingerprint("select 'é'".encode())
        == scan("select 'é'".encode()).fingerprint
    )


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    assert fingerprint("select 1") == 7014681905576730893


def test_lists_in_more_lists_than_are_followed_keep_their_length() -> None:
    def nested(depth: int, inner: str) -> str:
        return "select " + "array[" * depth + inner + "]" * depth

    assert fingerprint(nested(8, "1")) == fingerprint(nested(8, "1, 2"))
    assert fingerprint(nested(9, "1")) != fingerprint(nested(9, "1, 2"))


COUNTS = [
    ("", 0, 0),
    (" ; -- ;\n;/* ; /* ; */ ; */;", 0, 0),
    ("select 1", 1, 0),
    ("select ';'", 1, 0),
    ("select 'it'';s'; select 2", 2, 0),
    (r"select '\'; select ';'", 2, 0),
    (r"select e'\';'; select 2", 2, 0),
    ("select e'a'\n'\\';'; select 2", 2, 0),
    ("select ''\n; ';'", 2, 0),
    ('select 1 as "a"";b"; select 2', 2, 0),
    ("select $$;$$; select $a$;$$;$b$;$a$; select $1", 3, 0),
    ("select 1$$;$$; select 2", 2, 0),
    ("select a$$;$$", 2, 0),
    ("select $a; select 2", 2, 0),
    ("select 1 --;\r; select 2", 2, 0),
    ("select 1 /*; /* */ ;*/; select 2", 2, 0),
    ("select 1 */* ; */ 2; select 2", 2, 0),
    ("create rule r as on insert to t do also (select 1; select 2); select 3", 2, 0),
    (
        "create function f() returns int begin atomic "
        "select case when true then 1 end; select 2; end; select 3",
        2,
        0,
    ),
    (
        "create or replace procedure p() begin atomic insert into t values (1); "
        "select case 1 when 1 then case 2 when 2 then 3 end end; end",
        1,
        0,
    ),
    ("create function begin() returns int as 'select 1' language sql; select 2", 2, 0),
    ("create function f() returns int begin atomic select 1 case; end; a; b", 3, 0),
    ("create function f() returns int begin atomic select x case; end; a; b", 3, 0),
    ("select begin atomic; select 2", 2, 0),
    ("begin; select 1; commit", 3, 1),
    ("COMMIT WORK; end transaction; abort; rollback and no chain", 4, 4),
    ('rollback to savepoint a; rollback work to a; ROLLBACK TO "A"', 3, 3),
    ("rollback to savepoint", 1, 1),
    ("commit prepared 'a'; rollback prepared 'a'; prepare transaction 'a'", 3, 0),
    ("commit to a; rollback to; commit and; commit work work; commit 1", 5, 0),
    ("commit/**/;--\nrollback", 2, 2),
    ("savepoint a; release a; begin", 3, 0),
    ("commitment", 1, 0),
    ('"commit"', 1, 0),
    ("select 1; commit and chain and chain", 2, 0),
]


@pytest.mark.parametrize(("sql", "statements", "free"), COUNTS)
def test_statements_are_counted_as_the_server_splits_them(
    sql: str, statements: int, free: int
) -> None:
    found = scan(sql.encode())
    assert (found.statements, found.free_statements) == (statements, free)


FLAGS = [
    ("create temp table t (a int)", Flag.TEMP | Flag.DDL),
    ("create or replace temporary view v as select 1", Flag.TEMP | Flag.DDL),
    ("create local temp table t (a int)", Flag.TEMP | Flag.DDL),
    ("select 1 into temp t", Flag.TEMP),
    ('create table "pg_temp".t (a int)', Flag.TEMP | Flag.DDL),
    ("select temp from t", Flag(0)),
    ("listen a", Flag.LISTEN),
    ("unlisten *", Flag.UNLISTEN),
    ("select pg_catalog.pg_try_advisory_lock(1)", Flag.ADVISORY),
    ('select "pg_advisory_lock_shared"(1)', Flag.ADVISORY),
    ("select pg_advisory_xact_lock(1)", Flag(0)),
    ("select pg_advisory_unlock_all()", Flag.ADVISORY_UNLOCK),
    ("declare c cursor with hold for select 1", Flag.HOLD),
    ("declare c cursor without hold for select 1", Flag(0)),
    ("close c", Flag.CLOSE),
    ("prepare p as select 1", Flag.PREPARE),
    ("prepare transaction as select 1", Flag.PREPARE),
    ("prepare transaction 'x'", Flag.PREPARED_XACT | Flag.TRANSACTION),
    ("rollback prepared 'x'", Flag.PREPARED_XACT | Flag.TRANSACTION),
    ("execute p(1)", Flag.EXECUTE),
    ("explain (analyze) execute p(1)", Flag.EXECUTE),
    ("create table t as execute p(1)", Flag.EXECUTE | Flag.DDL),
    ("grant execute on function f to r", Flag.DDL),
    ("deallocate all", Flag.DEALLOCATE),
    ("load 'x'", Flag.LOAD),
    ("set search_path = a", Flag.SET),
    ("set session work_mem = 1", Flag.SET),
    ("set time zone 'UTC'", Flag.SET),
    ("set local work_mem to 1", Flag.SET_LOCAL),
    ("set local.answer = 42", Flag.SET),
    ("set transaction read only", Flag.SET_LOCAL),
    ("set constraints all deferred", Flag.SET_LOCAL),
    ("set session characteristics as transaction read only", Flag.SET),
    ("set local role r", Flag.SET_LOCAL),
    ("set role r", Flag.SET | Flag.ROLE),
    ("set session role r", Flag.SET | Flag.ROLE),
    ("set session authorization r", Flag.SET | Flag.ROLE),
    ("set session_authorization to r", Flag.SET | Flag.ROLE),
    ("reset role", Flag.SET | Flag.ROLE),
    ("reset all", Flag.SET),
    ("update t set a = 1", Flag(0)),
    ("select set_config('a.b', 'c', false)", Flag.SET_CONFIG),
    ("update pg_settings set setting = 'x'", Flag.SET_CONFIG),
    ("select * from pg_settings", Flag(0)),
    ("discard all", Flag.DISCARD),
    ("start transaction", Flag.TRANSACTION),
    ("release a", Flag.TRANSACTION),
    ("copy t to stdout", Flag.COPY),
    ("select 1; listen a; create table t ()", Flag.LISTEN | Flag.DDL),
    ("select 'listen a' /* ; listen a */ -- ; listen a", Flag(0)),
]


@pytest.mark.parametrize(("sql", "flags"), FLAGS)
def test_session_state_is_seen_where_it_is_made(sql: str, flags: Flag) -> None:
    assert scan(sql.encode()).flags == flags


KINDS = [
    ("", Kind.EMPTY),
    (";;", Kind.EMPTY),
    ("frobnicate", Kind.OTHER),
    ("1", Kind.OTHER),
    ("start transaction; select 1", Kind.BEGIN),
    ("END", Kind.COMMIT),
    ("abort", Kind.ROLLBACK),
    ("(select 1) union (select 2)", Kind.SELECT),
    ("with a as (select 1) delete from t", Kind.SELECT),
    ("/* hi */ Copy t from stdin", Kind.COPY),
    ("reset x", Kind.SET),
    ("do $$ begin end $$", Kind.CALL),
    ("alter table t add a int", Kind.DDL),
    ("analyze t", Kind.MAINTAIN),
    ("selects", Kind.OTHER),
]


@pytest.mark.parametrize(("sql", "kind"), KINDS)
def test_the_first_leading_keyword_is_the_kind(sql: str, kind: Kind) -> None:
    assert scan(sql.encode()).kind is kind


COMPLEXITIES = [
    ("", 100),
    ("select 1", 100),
    ("select * from a join b on true left join c on true", 200),
    ("select a, count(*) from t group by a having count(*) > 1 order by 2", 180),
    ("select (select 1) from t where exists (select 2)", 200),
    ("(select 1) union all (select 2)", 180),
    ("select rank() over (partition by a) from t", 160),
    ("select distinct a from t where b is distinct from c", 130),
    ("select distinct a from t where b is not distinct from c", 130),
    ("with a as (select 1) select * from a", 150),
    ("with recursive a as (select 1) select * from a", 250),
    ("select * from a, lateral (select a.x) b", 200),
    ("create index i on t (a)", 200),
    ("vacuum t", 300),
    ("call p()", 200),
    ("select 1; select * from a join b on true; select 2", 150),
    ("select " + "(select " * 100, 2000),
    ("select \"join\", t.join, 'join' from t", 100),
]


@pytest.mark.parametrize(("sql", "hundredths"), COMPLEXITIES)
def test_complexity_follows_its_table(sql: str, hundredths: int) -> None:
    assert scan(sql.encode()).complexity == hundredths


def test_python_s_names_are_those_of_the_declaration() -> None:
    declaration = Path(ogelproxy.__file__).with_name("_fingerprint.pxd").read_text()
    kinds = re.findall(r"KIND_(\w+) = (\d+)", declaration)
    assert {name: int(value) for name, value in kinds} == dict(Kind.__members__)
    flags = re.findall(r"FLAG_(\w+) = 1 << (\d+)", declaration)
    assert {name: 1 << int(value) for name, value in flags} == dict(Flag.__members__)


@pytest.fixture(scope="module")
def connection(postgres: Postgres) -> Iterator[psycopg.Connection]:
    """A connection whose statements leave nothing behind."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        yield connection


def results(connection: psycopg.Connection, sql: bytes) -> int | None:
    """How many statements the server found; None when it refused the text."""
    raw = connection.pgconn
    raw.send_query(sql)
    count = 0
    refused = False
    while (result := raw.get_result()) is not None:
        count += result.status != pq.ExecStatus.EMPTY_QUERY
        refused |= result.status == pq.ExecStatus.FATAL_ERROR
    return None if refused else count


#: Each is an expression wherever it stands behind white space.
EXPRESSIONS = [
    *(
        "1",
        ".5",
        "1.",
        "1e5",
        "1.5e-3",
        "- 1",
        "+1",
        "null",
        "'a'",
        "''",
        "''''",
        "';'",
    ),
    *(
        "'\\'",
        "e'\\''",
        "E'\\\\'",
        "e';\\';'",
        "e'a'\n'\\''",
        "'a' -- ;\n 'b'",
        "b'01'",
    ),
    *(
        "x'1f'",
        "n'a;b'",
        "U&'d;'",
        "$$;$$",
        "$a$;$$;$a$",
        "$a$$b$;$a$",
        "$_$'$_$",
        "$é$;$é$",
    ),
    *(
        '(select 1 as ";""")',
        "(1)",
        "array[1, 2]",
        "'{1,2}'::int[]",
        "1/* ; */",
        "1--;\n",
    ),
    *("/* ' */ 1", "1 /* /* ; */ ' */", "2*/* ; */3", "4-/* ; */1", "5--;\n-1", "3!=4"),
    *(
        "case when true then 1 end",
        "case ';' when '' then 1 end",
        "1::text",
        "1 in (1,2)",
    ),
    *(
        '1 as ";"',
        '1 as U&";"',
        "1 as case",
        "1 as begin",
        "1 as a$b",
        "1 as a$$",
        "1 as é",
    ),
]
FILLERS = [" ", "\n", "\t", "/**/", "/* ; /* ' */ */", "--'\n", "\r", "\f"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda before, expressions, after: (
                f"{before}select {', '.join(expressions)}" + after
            ),
            st.sampled_from(FILLERS),
            st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=4),
            st.sampled_from(FILLERS),
        )
        | st.sampled_from(["", " ", "-- ;\n", "begin", "commit", "/* ; */"]),
        max_size=5,
    )
)
def test_postgres_finds_as_many_statements(
    connection: psycopg.Connection, statements: list[str]
) -> None:
    sql = ";".join(statements).encode()
    found = results(connection, sql)
    assert found == scan(sql).statements


@pytest.mark.parametrize(
    "sql",
    [
        "begin; create table t (a int);"
        "create rule r as on insert to t do also (select 1; select 2); rollback",
        "begin; create function pg_temp.f() returns int begin atomic "
        "select case when true then 1 end; select 2 as x; end; select 1; rollback",
        "begin; create function pg_temp.f(a int) returns int begin atomic "
        "return case when a between -1 and 2 then case a when 1 then 3 end end; end;"
        "select pg_temp.f(1); rollback",
        "begin; create procedure pg_temp.p() begin atomic select 1; "
        "select 2 order by case when true then 1 end; end; rollback",
        "begin; do $do$ begin perform 1; perform ';'; end $do$; rollback",
        "set local.answer = 42; set local.answer to 42; reset local.answer",
        "begin; savepoint a; rollback to savepoint a; rollback work to a; "
        "commit and no chain",
        "prepare transaction as select 1; deallocate transaction",
    ],
)
def test_postgres_splits_tricky_statements_the_same_way(
    connection: psycopg.Connection, sql: str
) -> None:
    assert results(connection, sql.encode()) == scan(sql.encode()).statements
