// Tables as Drizzle sees them.

import { relations } from "drizzle-orm";
import * as t from "drizzle-orm/pg-core";

const matrix = t.pgSchema("matrix");

const bytea = t.customType({ dataType: () => "bytea" });

export const mood = matrix.enum("mood", ["sad", "happy"]);

export const item = matrix.table("item", {
  id: t.serial("id").primaryKey(),
  name: t.text("name").notNull().unique(),
  price: t.numeric("price", { precision: 10, scale: 2 }),
  mood: mood("mood"),
});

export const part = matrix.table("part", {
  id: t.serial("id").primaryKey(),
  itemId: t.integer("item_id").notNull(),
});

export const wide = matrix.table("wide", {
  id: t.integer("id"),
  body: t.text("body"),
  bytes: bytea("bytes"),
});

export const account = matrix.table("account", {
  id: t.integer("id").primaryKey(),
  balance: t.integer("balance").notNull(),
});

// Made by the case that uses it.
export const typed = matrix.table("typed", {
  small: t.smallint("small"),
  whole: t.integer("whole"),
  big: t.bigint("big", { mode: "bigint" }),
  single: t.real("single"),
  double: t.doublePrecision("double"),
  exact: t.numeric("exact"),
  flag: t.boolean("flag"),
  words: t.text("words"),
  short: t.varchar("short", { length: 10 }),
  day: t.date("day"),
  hour: t.time("hour"),
  moment: t.timestamp("moment", { withTimezone: true }),
  span: t.interval("span"),
  key: t.uuid("key"),
  document: t.jsonb("document"),
  text: t.json("text"),
  list: t.integer("list").array(),
  names: t.text("names").array(),
  mood: mood("mood"),
  address: t.inet("address"),
  place: t.point("place", { mode: "xy" }),
});

export const itemRelations = relations(item, ({ many }) => ({ parts: many(part) }));

export const partRelations = relations(part, ({ one }) => ({
  item: one(item, { fields: [part.itemId], references: [item.id] }),
}));
