// What lasts for a connection: settings, temporary tables, listening.

import assert from "node:assert/strict";
import { once } from "node:events";
import pg from "pg";

import { directUrl, soon, test, url } from "../report.mjs";
import { code, connected, elsewhere, scalar } from "./client.mjs";

async function clients(count, body) {
  const opened = Array.from(
    { length: count },
    () => new pg.Client({ connectionString: url }),
  );
  await Promise.all(opened.map((client) => client.connect()));
  const result = await body(opened);
  await Promise.all(opened.map((client) => client.end()));
  return result;
}

test("keeps the settings of ten connections apart", () =>
  clients(10, async (opened) => {
    await Promise.all(
      opened.map(async (client, n) => {
        await client.query(`SET application_name = 'client ${n}'`);
        await client.query("SELECT set_config('search_path', $1, false)", [`s${n}`]);
        await client.query(`SET TimeZone = '${n}'; SET my.own = '${n}'`);
      }),
    );
    for (let turn = 0; turn < 5; turn++) {
      await Promise.all(
        opened.map(async (client, n) => {
          const { rows } = await client.query({
            text:
              "SELECT current_setting('application_name')," +
              " current_setting('search_path'), current_setting('my.own'), extract(timezone_hour FROM now())::int",
            rowMode: "array",
          });
          assert.deepEqual(rows, [[`client ${n}`, `s${n}`, `${n}`, n]]);
        }),
      );
    }
  }));

test("resets settings to those of the start-up packet", () =>
  connected(
    async (client) => {
      const shown = [];
      for (const statement of [
        "SET application_name = 'other'",
        "RESET application_name",
        "SET lock_timeout = '8s'",
        "RESET ALL",
        "SET lock_timeout = '9s'",
        "DISCARD ALL",
      ]) {
        await client.query(statement);
        shown.push(
          await scalar(client, "SHOW application_name"),
          await scalar(client, "SHOW lock_timeout"),
        );
      }
      return shown;
    },
    { application_name: "first", options: "-c lock_timeout=7s" },
  ));

test("forgets at the end of a transaction what it set for it", () =>
  connected(async (client) => {
    const shown = [];
    for (const end of ["COMMIT", "ROLLBACK"]) {
      await client.query("BEGIN");
      await client.query("SET LOCAL lock_timeout = '9s'");
      shown.push(await scalar(client, "SHOW lock_timeout"));
      await client.query(end);
      shown.push(await elsewhere(() => scalar(client, "SHOW lock_timeout")));
    }
    return shown;
  }));

test("forgets a setting with the transaction that is rolled back", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    await client.query("SET application_name = 'rolled back'");
    await client.query("ROLLBACK");
    return scalar(client, "SHOW application_name");
  }));

test("hears of settings that the server reports", () =>
  connected(async (client) => {
    const heard = [];
    client.connection.on("parameterStatus", ({ parameterName, parameterValue }) =>
      heard.push([parameterName, parameterValue]),
    );
    await client.query("BEGIN; SET TimeZone = 'Asia/Tokyo'");
    await client.query("ROLLBACK");
    await client.query("BEGIN; SET LOCAL DateStyle = 'German'; COMMIT");
    return heard;
  }));

test("keeps a temporary table", () =>
  connected(async (client) => {
    await client.query("CREATE TEMP TABLE kept AS SELECT 1 AS a");
    const read = await elsewhere(() => client.query("SELECT a FROM kept"));
    await client.query("DROP TABLE kept");
    return [read.rows, await code(client.query("SELECT a FROM kept"))];
  }));

test("keeps a lock of its session", () =>
  connected((one) =>
    connected(async (two) => {
      const attempt = "SELECT pg_try_advisory_lock(4711)";
      await one.query("SELECT pg_advisory_lock(4711)");
      const before = await scalar(two, attempt);
      await one.query("SELECT pg_advisory_unlock(4711)");
      const after = await scalar(two, attempt);
      await two.query("SELECT pg_advisory_unlock_all()");
      assert.deepEqual([before, after], [false, true]);
    }),
  ));

test("keeps a cursor with hold", () =>
  connected(async (client) => {
    await client.query("BEGIN");
    await client.query(
      "DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 5)::int AS a",
    );
    await client.query("COMMIT");
    const { rows } = await elsewhere(() => client.query("FETCH 2 FROM held"));
    const rest = await client.query("FETCH ALL FROM held");
    await client.query("CLOSE held");
    return [rows, rest.rows];
  }));

test("keeps a statement prepared in SQL", () =>
  connected(async (client) => {
    await client.query("PREPARE in_sql (int) AS SELECT $1 * 2 AS a");
    const { rows } = await elsewhere(() => client.query("EXECUTE in_sql(21)"));
    await client.query("DEALLOCATE in_sql");
    return [rows, await code(client.query("EXECUTE in_sql(21)"))];
  }));

test("hears notifications from elsewhere", () =>
  connected((client) =>
    connected(
      async (other) => {
        const heard = [];
        const third = new Promise((resolve) => {
          client.on("notification", ({ channel, payload }) => {
            heard.push([channel, payload]);
            if (heard.length === 3) resolve();
          });
        });
        await client.query("LISTEN one");
        await client.query('LISTEN "Two"');
        await other.query("NOTIFY one");
        await other.query("SELECT pg_notify('Two', $1), pg_notify('three', '')", ["ü"]);
        await other.query("NOTIFY one, 'last'");
        await soon(third);
        return heard;
      },
      { connectionString: directUrl },
    ),
  ));

test("hears its own notifications", () =>
  connected(async (client) => {
    await client.query("LISTEN own");
    const heard = once(client, "notification");
    await client.query("BEGIN; NOTIFY own, 'x'; COMMIT");
    const [{ channel, payload, processId }] = await soon(heard);
    assert.equal(typeof processId, "number");
    return [channel, payload];
  }));

test("hears nothing after UNLISTEN", () =>
  connected(async (client) => {
    const heard = [];
    client.on("notification", ({ channel }) => heard.push(channel));
    const next = () => soon(once(client, "notification"));
    for (const channel of ["a", "b"]) await client.query(`LISTEN ${channel}`);
    await client.query("UNLISTEN a");
    await Promise.all([next(), client.query("NOTIFY a; NOTIFY b")]);
    await client.query("UNLISTEN *");
    await client.query("NOTIFY b");
    await client.query("LISTEN c");
    await Promise.all([next(), client.query("NOTIFY c")]);
    assert.deepEqual(heard, ["b", "c"]);
  }));

test("listens beside other statements", () =>
  connected(async (client) => {
    await client.query("SELECT 1; LISTEN beside");
    const heard = soon(once(client, "notification"));
    await client.query("NOTIFY beside");
    return (await heard)[0].channel;
  }));
