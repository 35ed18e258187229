// Drizzle over the driver that the argument names: `pg` or `postgres`.

import pg from "pg";
import postgres from "postgres";
import { drizzle as drizzlePg } from "drizzle-orm/node-postgres";
import { drizzle as drizzlePostgres } from "drizzle-orm/postgres-js";

import { run, url } from "../report.mjs";
import { declare } from "./cases.mjs";
import * as schema from "./schema.mjs";

const openers = {
  pg(max) {
    const pool = new pg.Pool({ connectionString: url, max });
    return [drizzlePg(pool, { schema }), () => pool.end()];
  },
  postgres(max) {
    const sql = postgres(url, { max, onnotice: () => {} });
    return [drizzlePostgres(sql, { schema }), () => sql.end({ timeout: 5 })];
  },
};

const open = openers[process.argv[2]];

declare(async (body, max = 1) => {
  const [db, close] = open(max);
  try {
    return await body(db);
  } finally {
    await close();
  }
});
await run();
