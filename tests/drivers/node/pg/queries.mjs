// node-postgres: unnamed and named statements, one query after the other.

import assert from "node:assert/strict";
import { once } from "node:events";
import pg from "pg";

import { directUrl, test, url } from "../report.mjs";
import { BYTES, HARD_TEXT, VALUES } from "../values.mjs";
import { code, connected, elsewhere, failed, scalar } from "./client.mjs";

test("connects by URL", () =>
  connected(async (client) => {
    const encoding = await scalar(client, "SHOW client_encoding");
    return [encoding, await scalar(client, "SELECT current_user = session_user")];
  }));

test("connects with settings of the start-up packet", () =>
  connected(
    async (client) => {
      const shown = [];
      for (const name of [
        "application_name",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "work_mem",
        "search_path",
      ]) {
        shown.push(await elsewhere(() => scalar(client, `SHOW ${name}`)));
      }
      assert.deepEqual(shown, ["a name", "41s", "42s", "43s", "7MB", "matrix, public"]);
    },
    {
      application_name: "a name",
      statement_timeout: 41_000,
      lock_timeout: 42_000,
      idle_in_transaction_session_timeout: 43_000,
      options: "-c work_mem=7MB -c search_path=matrix,\\ public",
    },
  ));

test("is refused with a wrong password", async () => {
  const wrong = new URL(url);
  wrong.password = "wrong";
  const client = new pg.Client({ connectionString: wrong.href });
  assert.equal(await code(client.connect()), "28P01");
});

test("is refused at an unknown database", async () => {
  const wrong = new URL(url);
  wrong.pathname = "/nowhere";
  const client = new pg.Client({ connectionString: wrong.href });
  assert.equal(await code(client.connect()), "3D000");
});

async function sendEveryType(client) {
  const read = [];
  for (const [type, sent, shown] of VALUES) {
    const { rows } = await client.query(
      `SELECT $1::${type} AS value, ($1::${type})::text AS shown`,
      [type === "json" || type === "jsonb" ? JSON.stringify(sent) : sent],
    );
    assert.equal(rows[0].shown, shown, type);
    read.push(rows[0].value);
  }
  return read;
}

test("sends and reads every type in text", () =>
  connected(async (client) => {
    const read = await sendEveryType(client);
    const value = (type) => read[VALUES.findIndex(([name]) => name === type)];
    assert.equal(value("text"), HARD_TEXT);
    assert.deepEqual(value("bytea"), BYTES);
    assert.deepEqual(value("timestamptz"), new Date("2026-05-06T07:08:09.123Z"));
    assert.deepEqual(value("json"), { a: [1, null, "ü"], b: {} });
    assert.deepEqual(value("int4[]"), [1, -2, 3]);
    return read;
  }));

// The driver decodes a row as UTF-8 before it looks at binary values, so that only
// bytes below 128 survive it.
test("reads in binary", () =>
  connected(
    async (client) => {
      const { rows } = await client.query({
        text:
          "SELECT $1::int2 AS a, $2::int4 AS b, $3::int8 AS c, $4::float8 AS d," +
          " $5::numeric AS e, $6::bool AS f, $7::text AS g, $8::int4 AS h",
        values: [1, 66051, 2, 2, 3, true, "text", null],
      });
      const expected = {
        a: 1,
        b: 66051,
        c: 2,
        d: 2,
        e: 3,
        f: true,
        g: "text",
        h: null,
      };
      assert.deepEqual({ ...rows[0], c: Number(rows[0].c) }, expected);
    },
    { binary: true },
  ));

test("reads every type of a simple query", () =>
  connected(async (client) => {
    const list = VALUES.map(
      ([type, , shown], n) =>
        `${shown === null ? "NULL" : client.escapeLiteral(shown)}::${type} AS v${n}`,
    );
    const { rows, fields } = await client.query(`SELECT ${list.join(", ")}`);
    return [rows, fields.map(({ name, format }) => [name, format])];
  }));

test("reads the results of several statements of one query", () =>
  connected(async (client) => {
    const results = await client.query(
      "SELECT 1 AS a; CREATE TEMP TABLE gone (a int);" +
        " INSERT INTO gone VALUES (1), (2);" +
        " SELECT a FROM gone ORDER BY a; DROP TABLE gone; SELECT 'a;b' AS b",
    );
    return results.map(({ command, rowCount, rows }) => [command, rowCount, rows]);
  }));

test("reads results without rows, without columns and without a statement", () =>
  connected(async (client) => {
    const read = [];
    for (const text of ["", "-- nothing", "SELECT", "SELECT 1 WHERE false"]) {
      const values = text === "SELECT" ? [] : undefined;
      const { command, rowCount, rows, fields } = await client.query(text, values);
      read.push([command, rowCount, rows, fields.length]);
    }
    return read;
  }));

test("reads 1,600 columns", () =>
  connected(async (client) => {
    const list = Array.from({ length: 1600 }, (_, n) => `$1::int + ${n} AS c${n}`);
    const { rows } = await client.query({
      text: `SELECT ${list.join(", ")}`,
      values: [1],
      rowMode: "array",
    });
    assert.deepEqual(rows, [Array.from({ length: 1600 }, (_, n) => n + 1)]);
  }));

test("uses a named statement many times, on servers that don't know it", () =>
  connected(async (client) => {
    const ask = (n) =>
      client.query({ name: "twice", text: "SELECT $1::int * 2 AS a", values: [n] });
    for (let n = 0; n < 40; n++) {
      const { rows } = await (n % 4 ? ask(n) : elsewhere(() => ask(n)));
      assert.deepEqual(rows, [{ a: n * 2 }]);
    }
  }));

test("uses 300 named statements in turn", () =>
  connected(async (client) => {
    for (let turn = 0; turn < 2; turn++) {
      for (let n = 0; n < 300; n++) {
        const query = {
          name: `s${n}`,
          text: `SELECT ${n} + $1::int AS a`,
          values: [turn],
        };
        assert.deepEqual((await client.query(query)).rows, [{ a: n + turn }]);
      }
    }
  }));

test("gives one name to different statements of two clients", () =>
  connected((one) =>
    connected(async (two) => {
      for (let n = 0; n < 10; n++) {
        const queries = [
          one.query({ name: "same", text: "SELECT $1::int AS a", values: [n] }),
          two.query({ name: "same", text: "SELECT $1::text AS b", values: [n] }),
        ];
        const read = (await Promise.all(queries)).map(({ rows }) => rows);
        assert.deepEqual(read, [[{ a: n }], [{ b: `${n}` }]]);
      }
    }),
  ));

test("prepares a name again after its first text failed", () =>
  connected(async (client) => {
    const name = "mended";
    assert.equal(await code(client.query({ name, text: "SELEC 1" })), "42601");
    return (await client.query({ name, text: "SELECT 1 AS a" })).rows;
  }));

test("runs in SQL what it prepared in the protocol", () =>
  connected(async (client) => {
    const text = "SELECT $1::int * 2 AS a";
    await client.query({ name: "shared", text, values: [1] });
    const { rows } = await elsewhere(() => client.query("EXECUTE shared(21)"));
    return rows;
  }));

test("sees a column that was added under a named statement", () =>
  connected(async (client) => {
    await client.query("DELETE FROM matrix.item");
    await client.query("CREATE TABLE matrix.grown AS SELECT 1 AS a");
    const ask = { name: "grown", text: "SELECT count(*)::int FROM matrix.grown" };
    const before = (await client.query(ask)).rows;
    await client.query("ALTER TABLE matrix.grown ADD COLUMN b int");
    await client.query("INSERT INTO matrix.grown VALUES (2, 3)");
    const after = (await client.query(ask)).rows;
    await client.query("DROP TABLE matrix.grown");
    return [before, after, await code(client.query(ask))];
  }));

test("runs a transaction with savepoints", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    await client.query("INSERT INTO matrix.item (name) VALUES ($1)", ["kept"]);
    await client.query("SAVEPOINT one");
    const again = client.query("INSERT INTO matrix.item (name) VALUES ($1)", ["kept"]);
    assert.equal(await code(again), "23505");
    assert.equal(await code(client.query("SELECT 1")), "25P02");
    await client.query("ROLLBACK TO one");
    await client.query("SAVEPOINT two");
    await client.query("INSERT INTO matrix.item (name) VALUES ($1)", ["undone"]);
    await client.query("ROLLBACK TO two");
    await client.query("RELEASE one");
    await client.query("INSERT INTO matrix.item (name) VALUES ($1)", ["too"]);
    await client.query("COMMIT");
    const { rows } = await client.query("SELECT name FROM matrix.item ORDER BY id");
    assert.deepEqual(rows, [{ name: "kept" }, { name: "too" }]);
    await client.query("DELETE FROM matrix.item");
  }));

test("runs a transaction that is serializable and reads only", () =>
  connected(async (client) => {
    await client.query("BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY");
    const level = await scalar(client, "SHOW transaction_isolation");
    const write = client.query("INSERT INTO matrix.item (name) VALUES ('x')");
    const refused = await code(write);
    await client.query("ROLLBACK");
    return [level, refused, await scalar(client, "SHOW transaction_isolation")];
  }));

test("fails at COMMIT for a deferred constraint", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    await client.query("INSERT INTO matrix.part (item_id) VALUES (-1)");
    const refused = await code(client.query("COMMIT"));
    return [refused, await scalar(client, "SELECT count(*) FROM matrix.part")];
  }));

test("ends a failed transaction with COMMIT", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    assert.equal(await code(client.query("SELECT 1/0")), "22012");
    const { command } = await client.query("COMMIT");
    return [command, await scalar(client, "SELECT 1")];
  }));

const fieldsOf = (error) => {
  const { message, severity, detail, hint, position, where } = error;
  const { schema, table, column, dataType, constraint } = error;
  return [
    [error.code, message, severity, detail, hint, position, where],
    [schema, table, column, dataType, constraint],
  ];
};

test("reads every field of an error", () =>
  connected(async (client) => {
    const read = [];
    for (const [text, values] of [
      ["INSERT INTO matrix.item (name, price) VALUES ($1, $2)", ["x", -1]],
      ["INSERT INTO matrix.item (name) VALUES ($1)", [null]],
      ["SELECT 1 +\n FROM nowhere"],
      ["SELECT * FROM nowhere"],
      ["SELECT $1::int", ["no number"]],
      ["SELECT $1::matrix.even", [3]],
      [
        "DO $$ BEGIN RAISE EXCEPTION 'a message' USING ERRCODE = 'ZX123'," +
          " DETAIL = 'a detail', HINT = 'a hint', SCHEMA = 's', TABLE = 't'," +
          " COLUMN = 'c', DATATYPE = 'd', CONSTRAINT = 'k'; END $$",
      ],
    ]) {
      read.push(fieldsOf(await failed(client.query(text, values))));
      assert.equal(await scalar(client, "SELECT $1::int", [5]), 5);
    }
    return read;
  }));

test("undoes all statements of a query in which one fails", () =>
  connected(async (client) => {
    const text =
      "INSERT INTO matrix.item (name) VALUES ('a'); SELECT 1/0;" +
      " INSERT INTO matrix.item (name) VALUES ('b')";
    assert.equal(await code(client.query(text)), "22012");
    assert.equal(await scalar(client, "SELECT count(*)::int FROM matrix.item"), 0);
  }));

test("hears notices", () =>
  connected(async (client) => {
    const heard = [];
    client.on("notice", ({ severity, message, detail }) =>
      heard.push([severity, message, detail]),
    );
    await client.query("DROP TABLE IF EXISTS matrix.nothing");
    await client.query(
      "DO $$ BEGIN RAISE WARNING 'w' USING DETAIL = 'd'; RAISE NOTICE 'n'; END $$",
    );
    return heard;
  }));

test("refuses more parameters than there are", () =>
  connected(async (client) => {
    const refused = await failed(client.query("SELECT $1::int", [1, 2]));
    return [refused.code, await scalar(client, "SELECT 1")];
  }));

test("runs a pipeline of 500 queries", () =>
  connected(
    async (client) => {
      const queries = Array.from({ length: 500 }, (_, n) =>
        n % 3
          ? client.query("SELECT $1::int AS a", [n])
          : client.query({
              name: `p${n % 7}`,
              text: "SELECT $1::int AS a",
              values: [n],
            }),
      );
      const read = (await Promise.all(queries)).map(({ rows }) => rows[0].a);
      assert.deepEqual(
        read,
        Array.from({ length: 500 }, (_, n) => n),
      );
    },
    { pipeline: true },
  ));

test("recovers from errors in the middle of a pipeline", () =>
  connected(
    async (client) => {
      const texts = [
        "SELECT 1 AS a",
        "SELECT 1/0",
        "SELECT 2 AS a",
        "SELEC",
        "BEGIN",
        "INSERT INTO matrix.item (name) VALUES ('x')",
        "SELECT 1/0",
        "SELECT 3 AS a",
        "ROLLBACK",
        "SELECT count(*)::int AS a FROM matrix.item",
      ];
      const done = await Promise.allSettled(
        texts.map((text) => client.query({ text, values: [] })),
      );
      return done.map(({ value, reason }) => value?.rows ?? reason.code);
    },
    { pipeline: true },
  ));

test("runs simple and named queries in one pipeline", () =>
  connected(
    async (client) => {
      const read = await Promise.all([
        client.query("SELECT 1 AS a"),
        client.query({ name: "n", text: "SELECT $1::int AS a", values: [2] }),
        client.query("SELECT 3 AS a; SELECT 4 AS a"),
        client.query({ name: "n", text: "SELECT $1::int AS a", values: [5] }),
      ]);
      return read.flat().map(({ rows }) => rows);
    },
    { pipeline: true },
  ));

test("cancels a running query", () =>
  connected((client) =>
    connected(
      async (watch) => {
        await client.query("BEGIN");
        const pid = await scalar(client, "SELECT pg_backend_pid()");
        const query = client.query(new pg.Query("SELECT pg_sleep(20)"));
        const cancelled = once(query, "error");
        await untilAsleep(watch, pid);
        new pg.Client({ connectionString: url }).cancel(client, query);
        const [error] = await cancelled;
        assert.equal(error.code, "57014");
        await client.query("ROLLBACK");
        return [error.message, await scalar(client, "SELECT 1")];
      },
      { connectionString: directUrl },
    ),
  ));

async function untilAsleep(watch, pid) {
  const text =
    "SELECT count(*)::int FROM pg_stat_activity" +
    " WHERE pid = $1 AND wait_event = 'PgSleep'";
  while ((await scalar(watch, text, [pid])) === 0);
}

test("is stopped by statement_timeout", () =>
  connected(
    async (client) => {
      const stopped = await failed(client.query("SELECT pg_sleep($1)", [20]));
      return [stopped.code, stopped.message, await scalar(client, "SELECT 1")];
    },
    { statement_timeout: 100 },
  ));

test("is told when its server is ended", async () => {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  const lost = once(client, "error").then(([error]) => error.message);
  const ended = failed(client.query("SELECT pg_terminate_backend(pg_backend_pid())"));
  return [(await ended).code, await lost, await code(client.query("SELECT 1"))];
});

test("sends and reads 10 MB of text", () =>
  connected(async (client) => {
    const sent = "aé漢🐘".repeat(1_000_000);
    const row = await client.query(
      "INSERT INTO matrix.wide (body) VALUES ($1) RETURNING body, length(body)::int",
      [sent],
    );
    assert.equal(row.rows[0].length, 4_000_000);
    assert.ok(row.rows[0].body === sent);
    await client.query("DELETE FROM matrix.wide");
  }));

test("sends and reads 10 MB of bytea", () =>
  connected(async (client) => {
    const sent = Buffer.alloc(10_485_760, BYTES);
    const { rows } = await client.query({
      name: "wide",
      text: "SELECT $1::bytea AS bytes, md5($1::bytea) AS digest",
      values: [sent],
    });
    assert.ok(rows[0].bytes.equals(sent));
    return rows[0].digest;
  }));

test("reads 200,000 rows", () =>
  connected(async (client) => {
    const { rows } = await client.query(
      "SELECT n AS a, repeat('x', n % 50) AS b FROM generate_series(1, 200000) n",
    );
    assert.equal(rows.length, 200_000);
    assert.ok(rows.every(({ a, b }, n) => a === n + 1 && b.length === (n + 1) % 50));
  }));

test("runs 1,000 queries in a pool of 20", async () => {
  const pool = new pg.Pool({ connectionString: url, max: 20 });
  const queries = Array.from({ length: 1000 }, (_, n) =>
    pool.query({
      name: `pool${n % 5}`,
      text: `SELECT ${n % 5} + $1::int AS a`,
      values: [n],
    }),
  );
  const read = (await Promise.all(queries)).map(({ rows }) => rows[0].a);
  await pool.end();
  assert.deepEqual(
    read,
    Array.from({ length: 1000 }, (_, n) => n + (n % 5)),
  );
});

test("moves money in 200 transactions of a pool of 20", async () => {
  const pool = new pg.Pool({ connectionString: url, max: 20 });
  await Promise.all(
    Array.from({ length: 200 }, async (_, n) => {
      const client = await pool.connect();
      const [low, high] = [1 + (n % 4), 5 + (n % 6)];
      const move = "UPDATE matrix.account SET balance = balance + $1 WHERE id = $2";
      await client.query("BEGIN");
      await client.query(move, [-1, low]);
      await client.query(move, [1, high]);
      await client.query(n % 5 ? "COMMIT" : "ROLLBACK");
      client.release();
    }),
  );
  const { rows } = await pool.query(
    "SELECT id, balance FROM matrix.account ORDER BY id",
  );
  await pool.query("UPDATE matrix.account SET balance = 100");
  await pool.end();
  assert.equal(
    rows.reduce((sum, { balance }) => sum + balance, 0),
    1000,
  );
  return rows;
});
