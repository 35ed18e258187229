// node-postgres: unnamed and named statements, simple queries, pipelines, streams.

import { run } from "../report.mjs";
import "./queries.mjs";
import "./sessions.mjs";
import "./streams.mjs";

await run();
