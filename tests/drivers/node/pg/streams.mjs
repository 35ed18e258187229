// pg-cursor, pg-query-stream and pg-copy-streams.

import assert from "node:assert/strict";
import { Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";
import Cursor from "pg-cursor";
import { from as copyFrom, to as copyTo } from "pg-copy-streams";
import QueryStream from "pg-query-stream";

import { test } from "../report.mjs";
import { HARD_TEXT } from "../values.mjs";
import { connected, failed, scalar } from "./client.mjs";

const SERIES = "SELECT n AS a FROM generate_series(1, $1::int) n";

test("reads a cursor in parts", () =>
  connected(async (client) => {
    const cursor = client.query(new Cursor(SERIES, [1000]));
    const sizes = [];
    let sum = 0;
    for (;;) {
      const rows = await cursor.read(70);
      if (rows.length === 0) break;
      sizes.push(rows.length);
      sum += rows.reduce((total, { a }) => total + a, 0);
    }
    await cursor.close();
    assert.equal(sum, 500_500);
    return [sizes, await scalar(client, "SELECT 1")];
  }));

test("closes a cursor before its end", () =>
  connected(async (client) => {
    for (let turn = 0; turn < 5; turn++) {
      const cursor = client.query(new Cursor(SERIES, [100_000]));
      assert.equal((await cursor.read(10)).length, 10);
      await cursor.close();
      assert.equal(await scalar(client, "SELECT $1::int", [turn]), turn);
    }
  }));

test("reads a cursor within a transaction", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    await client.query("INSERT INTO matrix.item (name) VALUES ('a'), ('b'), ('c')");
    const cursor = client.query(
      new Cursor("SELECT name FROM matrix.item ORDER BY name", []),
    );
    const read = [await cursor.read(2), await cursor.read(2)];
    await cursor.close();
    await client.query("ROLLBACK");
    return [read, await scalar(client, "SELECT count(*) FROM matrix.item")];
  }));

test("meets an error in the middle of a cursor", () =>
  connected(async (client) => {
    const cursor = client.query(
      new Cursor("SELECT 100 / (50 - n) FROM generate_series(1, 100) n", []),
    );
    assert.equal((await cursor.read(40)).length, 40);
    assert.equal((await failed(cursor.read(40))).code, "22012");
    return scalar(client, "SELECT 1");
  }));

test("streams 50,000 rows", () =>
  connected(async (client) => {
    const stream = client.query(new QueryStream(SERIES, [50_000], { batchSize: 700 }));
    let count = 0;
    for await (const { a } of stream) assert.equal(a, ++count);
    assert.equal(count, 50_000);
    return scalar(client, "SELECT 1");
  }));

test("leaves a stream before its end", () =>
  connected(async (client) => {
    const stream = client.query(new QueryStream(SERIES, [500_000]));
    for await (const { a } of stream) if (a === 500) break;
    return scalar(client, "SELECT 1");
  }));

test("copies in and out", () =>
  connected(async (client) => {
    const lines = Array.from({ length: 50_000 }, (_, n) => `${n}\tname ${n} ü\n`);
    await pipeline(
      Readable.from(lines),
      client.query(copyFrom("COPY matrix.wide (id, body) FROM STDIN")),
    );
    const out = client.query(
      copyTo("COPY (SELECT id, body FROM matrix.wide ORDER BY id) TO STDOUT"),
    );
    assert.equal((await buffer(out)).toString(), lines.join(""));
    await client.query("DELETE FROM matrix.wide");
  }));

test("copies 10 MB in binary and in a transaction", () =>
  connected(async (client) => {
    await client.query(
      "INSERT INTO matrix.wide SELECT n, repeat($1, 1000), sha256(n::text::bytea)" +
        " FROM generate_series(1, 150) n",
      [HARD_TEXT],
    );
    const copied = await buffer(
      client.query(copyTo("COPY matrix.wide TO STDOUT (FORMAT binary)")),
    );
    await client.query("BEGIN");
    await client.query("CREATE TABLE matrix.twin (LIKE matrix.wide)");
    // In pieces that fit no boundary of rows.
    const pieces = function* () {
      for (let at = 0; at < copied.length; at += 12_345) {
        yield copied.subarray(at, at + 12_345);
      }
    };
    await pipeline(
      Readable.from(pieces()),
      client.query(copyFrom("COPY matrix.twin FROM STDIN (FORMAT binary)")),
    );
    const same = await scalar(
      client,
      "SELECT count(*)::int FROM matrix.wide NATURAL JOIN matrix.twin",
    );
    await client.query("ROLLBACK");
    await client.query("DELETE FROM matrix.wide");
    assert.equal(same, 150);
    return copied.length;
  }));

test("recovers from a copy whose data is wrong", () =>
  connected(async (client) => {
    const read = [];
    for (const lines of [["1\tx\n", "no number\ty\n"], ["1\n"], ["1\tx"]]) {
      const into = client.query(copyFrom("COPY matrix.wide (id, body) FROM STDIN"));
      const done = pipeline(Readable.from(lines), into);
      const error = await done.catch((reason) => reason);
      read.push([error?.code, error?.message, error?.where]);
      read.push(await scalar(client, "SELECT count(*)::int FROM matrix.wide"));
    }
    await client.query("DELETE FROM matrix.wide");
    return read;
  }));

test("gives up a copy that it began", () =>
  connected(async (client) => {
    const into = client.query(copyFrom("COPY matrix.wide (id, body) FROM STDIN"));
    const endless = async function* () {
      for (let n = 0; n < 1000; n++) yield `${n}\tx\n`;
      throw new Error("enough");
    };
    const stopped = await failed(pipeline(Readable.from(endless()), into));
    assert.equal(stopped.message, "enough");
    return scalar(client, "SELECT count(*)::int FROM matrix.wide");
  }));

test("recovers from a copy out that fails midway", () =>
  connected(async (client) => {
    const out = client.query(
      copyTo(
        "COPY (SELECT 100 / (5000 - n) FROM generate_series(1, 9000) n) TO STDOUT",
      ),
    );
    assert.equal((await failed(buffer(out))).code, "22012");
    return scalar(client, "SELECT 1");
  }));
