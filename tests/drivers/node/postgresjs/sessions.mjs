// What lasts for a connection: settings, reserved connections, listening.

import assert from "node:assert/strict";
import postgres from "postgres";

import { directUrl, soon, test, url } from "../report.mjs";
import { connected, elsewhere } from "./client.mjs";

test("keeps the settings of ten connections apart", async () => {
  const opened = Array.from({ length: 10 }, () => postgres(url, { max: 1 }));
  await Promise.all(
    opened.map(async (sql, n) => {
      await sql.unsafe(`SET application_name = 'client ${n}'`);
      await sql`SELECT set_config('search_path', ${`s${n}`}, false)`;
    }),
  );
  for (let turn = 0; turn < 5; turn++) {
    await Promise.all(
      opened.map(async (sql, n) => {
        const rows = await sql`
          SELECT current_setting('application_name'), current_setting('search_path')
        `.values();
        assert.deepEqual([...rows], [[`client ${n}`, `s${n}`]]);
      }),
    );
  }
  await Promise.all(opened.map((sql) => sql.end()));
});

test("keeps what a reserved connection set", () =>
  connected(
    async (sql) => {
      const reserved = await sql.reserve();
      await reserved`SET lock_timeout = '7s'`;
      await reserved`CREATE TEMP TABLE kept AS SELECT 1 AS a`;
      const read = await elsewhere(
        () => reserved`SELECT a, current_setting('lock_timeout') FROM kept`,
      );
      await reserved`DROP TABLE kept`;
      await reserved`RESET lock_timeout`;
      const reset = await reserved`SHOW lock_timeout`.values();
      reserved.release();
      return [[...read], reset];
    },
    { max: 3 },
  ));

test("hears of settings that the server reports", async () => {
  const heard = [];
  const onparameter = (name, value) => heard.push([name, value]);
  await connected(
    async (sql) => {
      await sql`SELECT 1`;
      heard.length = 0;
      await sql.begin((tx) => tx`SET LOCAL TimeZone = 'Asia/Tokyo'`);
    },
    { onparameter },
  );
  return heard;
});

test("hears notifications", () =>
  connected((sql) =>
    connected(
      async (other) => {
        const heard = [];
        let resolve;
        const last = new Promise((done) => (resolve = done));
        const hear = (payload) => {
          heard.push(payload);
          if (payload === "last") resolve();
        };
        const { unlisten } = await sql.listen("postgresjs", hear);
        await sql.notify("postgresjs", "of its own");
        await other.notify("postgresjs", "ü".repeat(3000));
        await other.notify("elsewhere", "not this");
        await other.begin(async (tx) => {
          await tx`NOTIFY postgresjs, 'last'`;
        });
        await soon(last);
        await unlisten();
        return heard;
      },
      { at: directUrl },
    ),
  ));
