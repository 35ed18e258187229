// A client for the length of one case.

import assert from "node:assert/strict";
import pg from "pg";

import { url } from "../report.mjs";

export async function connected(body, options = {}) {
  const client = new pg.Client({ connectionString: url, ...options });
  await client.connect();
  try {
    return await body(client);
  } finally {
    await client.end();
  }
}

// Run `body` while another client holds the server that was used last.
export async function elsewhere(body) {
  return connected(async (other) => {
    await other.query("BEGIN");
    const result = await body();
    await other.query("COMMIT");
    return result;
  });
}

export async function scalar(client, text, values) {
  const { rows } = await client.query({ text, values, rowMode: "array" });
  return rows[0][0];
}

export const failed = (promise) =>
  promise.then(
    () => assert.fail("it did not fail"),
    (error) => error,
  );

export const code = async (promise) => (await failed(promise)).code;
