// What programs do with Drizzle, whichever driver is below it.

import assert from "node:assert/strict";
import { asc, eq, gt, sql } from "drizzle-orm";

import { test } from "../report.mjs";
import { BYTES, HARD_TEXT } from "../values.mjs";
import { account, item, part, typed, wide } from "./schema.mjs";

// Drizzle wraps the driver's error.
const code = async (promise) => {
  const error = await promise.then(
    () => assert.fail("it did not fail"),
    (reason) => reason,
  );
  return (error.cause ?? error).code;
};

const ROW = {
  small: -32768,
  whole: 2147483647,
  big: 9223372036854775807n,
  single: 1.5,
  double: 5e-324,
  exact: "12345678901234567890.0123456789",
  flag: true,
  words: HARD_TEXT,
  short: "ü",
  day: "2026-02-28",
  hour: "13:14:15.123456",
  moment: new Date("2026-05-06T07:08:09.123Z"),
  span: "1 year 2 mons 3 days 04:05:06",
  key: "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
  document: { a: [1, null, "ü"], b: { c: true } },
  text: ["x", { y: 1 }],
  list: [1, -2, 3],
  names: ['a"b', "c,d", ""],
  mood: "happy",
  address: "192.168.0.1",
  place: { x: 1, y: 2.5 },
};

// Name the cases; `connected` runs a body with a database and so many connections.
export function declare(connected) {
  test("inserts and selects every type", () =>
    connected(async (db) => {
      await db.execute(sql`
        CREATE TABLE matrix.typed (
          small smallint, whole int, big bigint, single real, double float8,
          exact numeric, flag bool, words text, short varchar(10), day date, hour time,
          moment timestamptz, span interval, key uuid, document jsonb, text json,
          list int[], names text[], mood matrix.mood, address inet, place point
        )
      `);
      const nothing = Object.fromEntries(Object.keys(ROW).map((key) => [key, null]));
      const inserted = await db.insert(typed).values([ROW, nothing]).returning();
      const read = await db.select().from(typed).where(eq(typed.key, ROW.key));
      await db.execute(sql`DROP TABLE matrix.typed`);
      assert.deepEqual(inserted, [ROW, nothing]);
      assert.deepEqual(read, [ROW]);
    }));

  test("inserts, updates on conflict, deletes", () =>
    connected(async (db) => {
      const values = [{ name: "a", price: "1.50" }, { name: "b" }];
      await db.insert(item).values(values);
      const again = db
        .insert(item)
        .values({ name: "b", price: "7.00" })
        .onConflictDoUpdate({ target: item.name, set: { mood: "sad" } });
      const [{ name, mood }] = await again.returning();
      await db.update(item).set({ price: "9.00" }).where(eq(item.name, "a"));
      const read = await db
        .select({ name: item.name, price: item.price })
        .from(item)
        .where(gt(item.price, "2"))
        .orderBy(asc(item.name));
      const gone = await db.delete(item).returning({ name: item.name });
      return [name, mood, read, gone];
    }));

  test("queries relations", () =>
    connected(async (db) => {
      const [{ id }] = await db.insert(item).values({ name: "whole" }).returning();
      await db.insert(part).values([{ itemId: id }, { itemId: id }]);
      const found = await db.query.item.findMany({
        columns: { name: true },
        with: { parts: { columns: { itemId: true } } },
      });
      assert.deepEqual(found, [
        { name: "whole", parts: [{ itemId: id }, { itemId: id }] },
      ]);
      await db.delete(part);
      await db.delete(item);
    }));

  test("runs a prepared query many times", () =>
    connected(async (db) => {
      const ask = db
        .select({ id: account.id })
        .from(account)
        .where(eq(account.id, sql.placeholder("id")))
        .prepare("by_id");
      for (let n = 0; n < 50; n++) {
        const id = 1 + (n % 10);
        assert.deepEqual(await ask.execute({ id }), [{ id }]);
      }
    }));

  test("nests transactions", () =>
    connected(async (db) => {
      await db.transaction(
        async (tx) => {
          await tx.insert(item).values({ name: "kept" });
          const again = tx.transaction((inner) =>
            inner.insert(item).values({ name: "kept" }),
          );
          assert.equal(await code(again), "23505");
          await tx.transaction((inner) => inner.insert(item).values({ name: "too" }));
          await tx.transaction((inner) => inner.rollback()).catch(() => {});
        },
        { isolationLevel: "serializable" },
      );
      const gone = await db.delete(item).returning({ name: item.name });
      assert.deepEqual(gone, [{ name: "kept" }, { name: "too" }]);
    }));

  test("rolls a transaction back", () =>
    connected(async (db) => {
      const broken = db.transaction(async (tx) => {
        await tx.insert(item).values({ name: "gone" });
        await tx.insert(item).values({ name: "dear", price: "-1" });
      });
      assert.equal(await code(broken), "23514");
      assert.equal(await db.$count(item), 0);
    }));

  test("recovers from errors", () =>
    connected(async (db) => {
      const read = [];
      for (const query of [sql`SELECT 1/0`, sql`SELEC`, sql`SELECT ${"x"}::int`]) {
        read.push(await code(db.execute(query)));
        assert.equal(await db.$count(account), 10);
      }
      return read;
    }));

  test("sends and reads 10 MB of text and of bytea", () =>
    connected(async (db) => {
      const sent = {
        id: 1,
        body: "aé漢🐘".repeat(1e6),
        bytes: Buffer.alloc(10_485_760, BYTES),
      };
      await db.insert(wide).values(sent);
      const [{ body, bytes }] = await db.delete(wide).returning();
      assert.ok(body === sent.body);
      assert.ok(bytes.equals(sent.bytes));
    }));

  test("runs 1,000 queries and 100 transactions in a pool of 20", () =>
    connected(async (db) => {
      const asked = Array.from({ length: 1000 }, (_, n) =>
        db
          .select()
          .from(account)
          .where(eq(account.id, 1 + (n % 10))),
      );
      const moved = Array.from({ length: 100 }, (_, n) =>
        db.transaction(async (tx) => {
          const change = (by) => ({ balance: sql`${account.balance} + ${by}` });
          const [low, high] = [1 + (n % 4), 5 + (n % 6)];
          await tx.update(account).set(change(-1)).where(eq(account.id, low));
          await tx.update(account).set(change(1)).where(eq(account.id, high));
        }),
      );
      const read = await Promise.all(asked);
      assert.ok(read.every(([{ id }], n) => id === 1 + (n % 10)));
      await Promise.all(moved);
      const balances = await db.select().from(account).orderBy(account.id);
      await db.update(account).set({ balance: 100 });
      return balances;
    }, 20));
}
