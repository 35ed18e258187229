// A client for the length of one case.

import assert from "node:assert/strict";
import postgres from "postgres";

import { url } from "../report.mjs";

// One connection, unless `options` say otherwise.
export async function connected(body, options = {}) {
  const { at = url, ...rest } = options;
  const sql = postgres(at, { max: 1, onnotice: () => {}, ...rest });
  try {
    return await body(sql);
  } finally {
    await sql.end({ timeout: 5 });
  }
}

// Run `body` while another client holds the server that was used last.
export async function elsewhere(body) {
  return connected((other) => other.begin(body));
}

export const failed = (promise) =>
  Promise.resolve(promise).then(
    () => assert.fail("it did not fail"),
    (error) => error,
  );

export const code = async (promise) => (await failed(promise)).code;
