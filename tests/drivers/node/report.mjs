// The cases of one program: each runs once, in the order in which it was named, and
// is printed as one line of JSON. See ../programs.py for who reads it.

import { createHash } from "node:crypto";
import { inspect } from "node:util";

export const url = process.env.DRIVER_URL;
export const directUrl = process.env.DRIVER_DIRECT_URL;

const CASE_TIMEOUT_MS = 30_000;
const NOTIFICATION_TIMEOUT_MS = 5_000;
const MAX_VALUE_CHARACTERS = 2_000;

const cases = [];

// `body` returns what it read, for comparison with another way to the database.
export function test(name, body) {
  cases.push([name, body]);
}

export async function run() {
  for (const [name, body] of cases) {
    const line = { case: name, ok: false, value: "", error: "" };
    try {
      line.value = asText(await within(CASE_TIMEOUT_MS, body()));
      line.ok = true;
    } catch (error) {
      line.error = inspect(error).slice(0, MAX_VALUE_CHARACTERS);
    }
    process.stdout.write(`${JSON.stringify(line)}\n`);
  }
  // A case that failed may have left connections open.
  process.stdout.write("", () => process.exit());
}

// Wait for what a server sends unasked.
export const soon = (promise) => within(NOTIFICATION_TIMEOUT_MS, promise);

async function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(
      () => reject(new Error(`not done within ${milliseconds} ms`)),
      milliseconds,
    );
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

function asText(value) {
  const text = inspect(value, {
    depth: null,
    sorted: true,
    breakLength: Infinity,
    maxArrayLength: null,
    maxStringLength: null,
  });
  if (text.length <= MAX_VALUE_CHARACTERS) return text;
  return `sha256 ${createHash("sha256").update(text).digest("hex")}`;
}
