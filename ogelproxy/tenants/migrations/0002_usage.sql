-- What the usage sink writes beside platform.usage_metrics.

-- Which batches of which node have arrived: each counts once, however often sent.
CREATE TABLE platform.usage_nodes (
    node uuid PRIMARY KEY,
    delivered int8multirange NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- One row per batch, payer and statement. No foreign key: usage that arrives after
-- its organisation was deleted is entered all the same.
CREATE TABLE platform.usage_history (
    node uuid NOT NULL,
    batch bigint NOT NULL,
    slot integer NOT NULL,
    org_id uuid NOT NULL,
    handle text NOT NULL,
    tier text NOT NULL,
    database text NOT NULL,
    database_type text NOT NULL,
    application_name text NOT NULL,
    fingerprint bigint NOT NULL, -- the 64 bits as a signed number; 0: not told apart
    queries bigint NOT NULL,
    refused bigint NOT NULL,     -- by the limiter, not in queries
    errors bigint NOT NULL,
    sqlstate text,               -- of the latest error
    rows bigint NOT NULL,
    bytes_in bigint NOT NULL,
    bytes_out bigint NOT NULL,
    server_seconds double precision NOT NULL,
    queue_seconds double precision NOT NULL,
    throttled_seconds double precision NOT NULL,
    vcpu_seconds double precision NOT NULL,
    memory_gib_seconds double precision NOT NULL,
    longest_seconds double precision NOT NULL,
    first_at timestamptz NOT NULL,
    last_at timestamptz NOT NULL,
    PRIMARY KEY (node, batch, slot)
);
CREATE INDEX usage_history_org ON platform.usage_history (org_id, first_at);
-- Rows come in the order of time: the index that retention needs may be coarse.
CREATE INDEX usage_history_time ON platform.usage_history USING brin (first_at);
