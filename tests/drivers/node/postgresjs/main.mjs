// postgres.js: statements prepared throughout and sent without waiting for replies.

import { run } from "../report.mjs";
import "./queries.mjs";
import "./sessions.mjs";
import "./streams.mjs";

await run();
