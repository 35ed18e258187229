// Cursors, rows one by one, COPY.

import assert from "node:assert/strict";
import { Readable } from "node:stream";
import { buffer } from "node:stream/consumers";
import { pipeline } from "node:stream/promises";

import { test } from "../report.mjs";
import { HARD_TEXT } from "../values.mjs";
import { code, connected, failed } from "./client.mjs";

const series = (sql, last) =>
  sql`SELECT n AS a FROM generate_series(1, ${last}::int) n`;

test("reads a cursor in parts", () =>
  connected(async (sql) => {
    const sizes = [];
    let sum = 0;
    for await (const rows of series(sql, 1000).cursor(70)) {
      sizes.push(rows.length);
      sum += rows.reduce((total, { a }) => total + a, 0);
    }
    assert.equal(sum, 500_500);
    return [sizes, await sql`SELECT 1`.values()];
  }));

test("closes a cursor before its end", () =>
  connected(async (sql) => {
    for (let turn = 0; turn < 5; turn++) {
      let read = 0;
      await series(sql, 100_000).cursor(10, (rows) => {
        read += rows.length;
        return read >= 30 ? sql.CLOSE : undefined;
      });
      assert.equal(read, 30);
      for await (const [{ a }] of series(sql, 100_000).cursor()) if (a === 5) break;
      assert.deepEqual([...(await sql`SELECT ${turn}::int`.values())], [[turn]]);
    }
  }));

test("reads a cursor within a transaction", () =>
  connected((sql) =>
    sql.begin(async (tx) => {
      const read = [];
      for await (const rows of series(tx, 10).cursor(3)) read.push([...rows]);
      return [read, await tx`SELECT 1`.values()];
    }),
  ));

test("meets an error in the middle of a cursor", () =>
  connected(async (sql) => {
    let read = 0;
    const query = sql`SELECT 100 / (50 - n) FROM generate_series(1, ${100}::int) n`;
    const ended = query.cursor(10, (rows) => {
      read += rows.length;
    });
    assert.equal(await code(ended), "22012");
    return [read, await sql`SELECT 1`.values()];
  }));

test("reads 50,000 rows one by one", () =>
  connected(async (sql) => {
    let count = 0;
    await series(sql, 50_000).forEach(({ a }) => assert.equal(a, ++count));
    assert.equal(count, 50_000);
  }));

// The driver may leave the socket paused after a COPY to the client, so that its next
// query there would wait for ever.
const copiedOut = (text) =>
  connected(async (sql) => buffer(await sql.unsafe(text).readable()));

test("copies in and out", () =>
  connected(async (sql) => {
    const lines = Array.from({ length: 50_000 }, (_, n) => `${n}\tname ${n} ü\n`);
    const into = await sql`COPY matrix.wide (id, body) FROM STDIN`.writable();
    await pipeline(Readable.from(lines), into);
    const copied = await copiedOut(
      "COPY (SELECT id, body FROM matrix.wide ORDER BY id) TO STDOUT",
    );
    assert.equal(copied.toString(), lines.join(""));
    await sql`DELETE FROM matrix.wide`;
  }));

test("copies 10 MB in binary and in a transaction", () =>
  connected(async (sql) => {
    await sql`
      INSERT INTO matrix.wide
      SELECT n, repeat(${HARD_TEXT}, 1000), sha256(n::text::bytea)
      FROM generate_series(1, 150) n
    `;
    const copied = await copiedOut("COPY matrix.wide TO STDOUT (FORMAT binary)");
    const rolledBack = sql.begin(async (tx) => {
      await tx`CREATE TABLE matrix.twin (LIKE matrix.wide)`;
      const into = await tx`COPY matrix.twin FROM STDIN (FORMAT binary)`.writable();
      // In pieces that fit no boundary of rows.
      const pieces = function* () {
        for (let at = 0; at < copied.length; at += 12_345) {
          yield copied.subarray(at, at + 12_345);
        }
      };
      await pipeline(Readable.from(pieces()), into);
      const rows = await tx`
        SELECT count(*)::int FROM matrix.wide NATURAL JOIN matrix.twin
      `.values();
      assert.deepEqual([...rows], [[150]]);
      throw new Error("enough");
    });
    assert.equal((await failed(rolledBack)).message, "enough");
    await sql`DELETE FROM matrix.wide`;
    return copied.length;
  }));
