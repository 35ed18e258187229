// Values, statements, transactions, errors.

import assert from "node:assert/strict";

import { directUrl, test, url } from "../report.mjs";
import { BYTES, HARD_TEXT, VALUES } from "../values.mjs";
import { code, connected, elsewhere, failed } from "./client.mjs";

test("connects by URL", () =>
  connected(async (sql) => {
    const rows = await sql`SELECT current_user = session_user AS same, 1 AS one`;
    return [[...rows], sql.parameters.client_encoding, rows.command];
  }));

test("connects to a primary, with TLS where there is any", () =>
  connected((sql) => sql`SELECT 1 AS a`.values(), {
    ssl: "prefer",
    target_session_attrs: "primary",
  }));

test("connects with settings of the start-up packet", () =>
  connected(
    async (sql) => {
      const shown = [];
      for (const name of [
        "application_name",
        "statement_timeout",
        "search_path",
        "lock_timeout",
      ]) {
        await elsewhere(async () => {
          const [[value]] = await sql`SELECT current_setting(${name})`.values();
          shown.push(value);
        });
      }
      assert.deepEqual(shown, ["a name", "41s", "matrix, public", "42s"]);
    },
    {
      connection: {
        application_name: "a name",
        statement_timeout: 41_000,
        search_path: "matrix, public",
        lock_timeout: 42_000,
      },
    },
  ));

test("is refused with a wrong password", () => {
  const wrong = new URL(url);
  wrong.password = "wrong";
  return connected(async (sql) => assert.equal(await code(sql`SELECT 1`), "28P01"), {
    at: wrong.href,
  });
});

// The driver reads dates with `new Date`, which knows no infinity.
const SENDABLE = VALUES.filter(([, sent]) => sent !== "infinity");

async function sendEveryType(sql, options) {
  const read = [];
  for (const [type, sent, shown] of SENDABLE) {
    const [row] = await sql.unsafe(
      `SELECT $1::${type} AS value, ($1::${type})::text AS shown`,
      [sent],
      options,
    );
    assert.equal(row.shown, shown, type);
    read.push(row.value);
  }
  const value = (type) => read[SENDABLE.findIndex(([name]) => name === type)];
  assert.equal(value("text"), HARD_TEXT);
  assert.deepEqual(value("bytea"), BYTES);
  assert.deepEqual(value("timestamptz"), new Date("2026-05-06T07:08:09.123Z"));
  assert.deepEqual(value("json"), { a: [1, null, "ü"], b: {} });
  assert.deepEqual(value("int4[]"), [1, -2, 3]);
  return read;
}

test("sends and reads every type", () =>
  connected((sql) => sendEveryType(sql, { prepare: true })));

test("sends and reads every type with unnamed statements", () =>
  connected((sql) => sendEveryType(sql, { prepare: false }), { prepare: false }));

test("reads every type of a simple query", () =>
  connected(async (sql) => {
    const quoted = (text) =>
      `E'${text.replaceAll("\\", "\\\\").replaceAll("'", "''")}'`;
    const list = SENDABLE.map(
      ([type, , shown], n) =>
        `${shown === null ? "NULL" : quoted(shown)}::${type} AS v${n}`,
    );
    return [...(await sql.unsafe(`SELECT ${list.join(", ")}`).simple())];
  }));

test("inserts, updates and selects with its helpers", () =>
  connected(async (sql) => {
    const items = [
      { name: "a", price: 1.5, mood: "happy" },
      { name: "b", price: null, mood: "sad" },
    ];
    const inserted = await sql`INSERT INTO matrix.item ${sql(items)} RETURNING name`;
    const change = { price: 3, mood: null };
    await sql`UPDATE matrix.item SET ${sql(change)} WHERE name = ANY(${["b", "z"]})`;
    const columns = ["name", "price", "mood"];
    const dear = sql`price > ${2}`;
    const read =
      await sql`SELECT ${sql(columns)} FROM ${sql("matrix.item")} WHERE ${dear}`;
    const counted =
      await sql`SELECT count(*) FROM matrix.item WHERE name IN ${sql(["a"])}`;
    const deleted = await sql`DELETE FROM matrix.item`;
    return [[...inserted], [...read], [...counted], deleted.count];
  }));

test("reads the results of several statements of one query", () =>
  connected(async (sql) => {
    const results =
      await sql`SELECT 1 AS a; SELECT 2 AS b WHERE false; SELECT 'x;y' AS c`.simple();
    return results.map((rows) => [rows.command, rows.count, [...rows]]);
  }));

test("describes a statement", () =>
  connected(async (sql) => {
    const { types, columns } = await sql`
      SELECT ${1}::int8 AS a, ${"x"}::matrix.pair IS NULL AS b, ${[1]}::int[] AS c
    `.describe();
    return [types.length, columns.map(({ name, type }) => [name, type]), types[0]];
  }));

test("reads raw bytes and values", () =>
  connected(async (sql) => {
    const raw = await sql`SELECT ${42}::int4, 'ü', NULL`.raw();
    const values = await sql`SELECT ${42}::int4, 'ü', NULL`.values();
    return [raw, values];
  }));

test("uses a statement many times, on servers that don't know it", () =>
  connected(async (sql) => {
    const ask = async (n) =>
      assert.deepEqual([...(await twice(sql, n))], [{ a: n * 2 }]);
    for (let n = 0; n < 40; n++) await (n % 4 ? ask(n) : elsewhere(() => ask(n)));
  }));

const twice = (sql, n) => sql`SELECT ${n}::int * 2 AS a`;

test("uses 300 statements in turn", () =>
  connected(async (sql) => {
    for (let turn = 0; turn < 2; turn++) {
      for (let n = 0; n < 300; n++) {
        const text = `SELECT ${n} + $1::int AS a`;
        const rows = await sql.unsafe(text, [turn], { prepare: true });
        assert.deepEqual([...rows], [{ a: n + turn }]);
      }
    }
  }));

test("sends 500 queries without waiting", () =>
  connected(async (sql) => {
    const queries = Array.from({ length: 500 }, (_, n) =>
      n % 3 ? twice(sql, n) : sql.unsafe(`SELECT ${n * 2} AS a`),
    );
    const read = (await Promise.all(queries)).map(([{ a }]) => a);
    assert.deepEqual(
      read,
      Array.from({ length: 500 }, (_, n) => n * 2),
    );
  }));

test("recovers from errors among queries sent without waiting", () =>
  connected(async (sql) => {
    const name = "x";
    const zero = 0;
    const done = await Promise.allSettled([
      sql`SELECT 1 AS a`,
      sql`SELECT 1 / ${zero}::int`,
      sql`SELECT 2 AS a`,
      sql`SELEC`,
      sql`INSERT INTO matrix.item (name) VALUES (${name}) RETURNING name`,
      sql`INSERT INTO matrix.item (name) VALUES (${name}) RETURNING name`,
      sql.unsafe("SELECT 3 AS a; SELECT 1/0"),
      sql`SELECT ${"no number"}::text::int`,
      sql`DELETE FROM matrix.item RETURNING name`,
    ]);
    return done.map(({ value, reason }) => (value ? [...value] : reason.code));
  }));

test("runs a transaction with savepoints", () =>
  connected(async (sql) => {
    await sql.begin(async (tx) => {
      await tx`INSERT INTO matrix.item (name) VALUES ('kept')`;
      const again = tx.savepoint(
        (inner) => inner`INSERT INTO matrix.item (name) VALUES ('kept')`,
      );
      assert.equal(await code(again), "23505");
      await tx.savepoint("named", async (inner) => {
        await inner`INSERT INTO matrix.item (name) VALUES ('too')`;
        const undone = inner.savepoint(async (deep) => {
          await deep`INSERT INTO matrix.item (name) VALUES ('undone')`;
          throw new Error("enough");
        });
        assert.equal((await failed(undone)).message, "enough");
      });
    });
    const rows = await sql`DELETE FROM matrix.item RETURNING name`;
    assert.deepEqual([...rows], [{ name: "kept" }, { name: "too" }]);
  }));

test("rolls a transaction back", () =>
  connected(async (sql) => {
    const broken = sql.begin("ISOLATION LEVEL SERIALIZABLE", async (tx) => {
      await tx`INSERT INTO matrix.item (name) VALUES ('gone')`;
      await tx`SELECT 1/0`.catch(() => {});
      await tx`SELECT 1`;
    });
    assert.equal(await code(broken), "22012");
    const late = sql.begin((tx) => tx`INSERT INTO matrix.part (item_id) VALUES (-1)`);
    assert.equal(await code(late), "23503");
    return sql`SELECT (SELECT count(*) FROM matrix.item), count(*) FROM matrix.part`.values();
  }));

test("sends the queries of a transaction without waiting", () =>
  connected(async (sql) => {
    const results = await sql.begin((tx) => [
      tx`INSERT INTO matrix.item (name) VALUES ('a') RETURNING name`,
      tx`SELECT count(*)::int AS n FROM matrix.item`,
      tx`DELETE FROM matrix.item RETURNING name`,
    ]);
    return results.map((rows) => [...rows]);
  }));

test("reads every field of an error", () =>
  connected(async (sql) => {
    const read = [];
    for (const query of [
      sql`INSERT INTO matrix.item (name, price) VALUES (${"x"}, ${-1})`,
      sql`INSERT INTO matrix.item (name) VALUES (${null})`,
      sql`SELECT * FROM nowhere`,
      sql`SELECT ${3}::matrix.even`,
      sql`SELECT 1 +\n FROM nowhere`,
      sql`DO $$ BEGIN RAISE EXCEPTION 'a message' USING ERRCODE = 'ZX123',
        DETAIL = 'a detail', HINT = 'a hint', SCHEMA = 's', TABLE = 't',
        COLUMN = 'c', DATATYPE = 'd', CONSTRAINT = 'k'; END $$`,
    ]) {
      const error = await failed(query);
      const {
        stack,
        file,
        line,
        routine,
        query: _q,
        parameters: _p,
        ...fields
      } = error;
      read.push([error.message, fields]);
      assert.deepEqual([...(await twice(sql, 1))], [{ a: 2 }]);
    }
    return read;
  }));

test("hears notices", async () => {
  const heard = [];
  const onnotice = ({ severity, message }) => heard.push([severity, message]);
  await connected(
    async (sql) => {
      await sql`DROP TABLE IF EXISTS matrix.nothing`;
      await sql`DO $$ BEGIN RAISE WARNING 'w'; RAISE NOTICE 'n'; END $$`;
    },
    { onnotice },
  );
  return heard;
});

test("cancels a running query", () =>
  connected((sql) =>
    connected(
      async (watch) => {
        for (let turn = 0; turn < 3; turn++) {
          const mark = `cancelled ${turn}`;
          const query = sql`SELECT pg_sleep(20), ${mark}::text`.execute();
          const ended = failed(query);
          await untilAsleep(watch);
          await query.cancel();
          assert.equal((await ended).code, "57014");
          assert.deepEqual([...(await twice(sql, 2))], [{ a: 4 }]);
        }
      },
      { at: directUrl },
    ),
  ));

async function untilAsleep(watch) {
  const asleep = () => watch`
    SELECT 1 FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event = 'PgSleep'
  `;
  while ((await asleep()).count === 0);
}

test("is stopped by statement_timeout", () =>
  connected(
    async (sql) => {
      const stopped = await failed(sql`SELECT pg_sleep(${20})`);
      return [stopped.code, stopped.message, await sql`SELECT 1`.values()];
    },
    { connection: { statement_timeout: 100 } },
  ));

test("sends and reads 10 MB of text and of bytea", () =>
  connected(async (sql) => {
    const text = "aé漢🐘".repeat(1_000_000);
    const bytes = Buffer.alloc(10_485_760, BYTES);
    const [row] = await sql`
      INSERT INTO matrix.wide (body, bytes) VALUES (${text}, ${bytes})
      RETURNING body, bytes, md5(bytes) AS digest
    `;
    await sql`DELETE FROM matrix.wide`;
    assert.ok(row.body === text);
    assert.ok(row.bytes.equals(bytes));
    return row.digest;
  }));

test("runs 1,000 queries in a pool of 20", () =>
  connected(
    async (sql) => {
      const queries = Array.from({ length: 1000 }, (_, n) =>
        sql.unsafe(`SELECT ${n % 5} + $1::int AS a`, [n], { prepare: true }),
      );
      const read = (await Promise.all(queries)).map(([{ a }]) => a);
      assert.deepEqual(
        read,
        Array.from({ length: 1000 }, (_, n) => n + (n % 5)),
      );
    },
    { max: 20 },
  ));

test("moves money in 200 transactions of a pool of 20", () =>
  connected(
    async (sql) => {
      const moved = Array.from({ length: 200 }, (_, n) =>
        sql.begin(async (tx) => {
          const [low, high] = [1 + (n % 4), 5 + (n % 6)];
          await tx`UPDATE matrix.account SET balance = balance - 1 WHERE id = ${low}`;
          await tx`UPDATE matrix.account SET balance = balance + 1 WHERE id = ${high}`;
          if (n % 5 === 0) throw new Error("enough");
        }),
      );
      const done = await Promise.allSettled(moved);
      assert.equal(
        done.filter(({ reason }) => reason?.message === "enough").length,
        40,
      );
      const rows = await sql`SELECT id, balance FROM matrix.account ORDER BY id`;
      await sql`UPDATE matrix.account SET balance = 100`;
      assert.equal(
        rows.reduce((sum, { balance }) => sum + balance, 0),
        1000,
      );
      return [...rows];
    },
    { max: 20 },
  ));
