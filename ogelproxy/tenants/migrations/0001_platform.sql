-- The control plane: tenants, what their tiers allow, where their data is.
--
-- Running proxies keep these rows in memory. Triggers announce every change on
-- the channel platform_changes and raise organizations.version, so that a plain
-- UPDATE, made by anyone with the right to make it, reaches them.

CREATE SEQUENCE platform.change_version;

CREATE TABLE platform.tier_limits (
    name text PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,31}$'),
    max_connections integer NOT NULL CHECK (max_connections >= 0),
    -- "< Infinity" also refuses NaN, which Postgres sorts above everything.
    max_queries_per_second double precision NOT NULL
        CHECK (max_queries_per_second > 0 AND max_queries_per_second < 'Infinity'),
    max_storage_gb double precision NOT NULL
        CHECK (max_storage_gb >= 0 AND max_storage_gb < 'Infinity'),
    may_burst boolean NOT NULL,
    monthly_fee numeric(12, 2) NOT NULL CHECK (monthly_fee >= 0),
    included_vcpu_hours double precision NOT NULL
        CHECK (included_vcpu_hours >= 0 AND included_vcpu_hours < 'Infinity'),
    included_memory_gb_hours double precision NOT NULL
        CHECK (included_memory_gb_hours >= 0 AND included_memory_gb_hours < 'Infinity'),
    overage_vcpu_hour numeric(12, 6) CHECK (overage_vcpu_hour >= 0),
    overage_gb_hour numeric(12, 6) CHECK (overage_gb_hour >= 0),
    max_databases integer CHECK (max_databases >= 0),
    features text[] NOT NULL DEFAULT '{}',
    statement_timeout double precision NOT NULL DEFAULT 0
        CHECK (statement_timeout >= 0 AND statement_timeout <= 2147483),
    idle_in_transaction_timeout double precision NOT NULL DEFAULT 0
        CHECK (idle_in_transaction_timeout >= 0
               AND idle_in_transaction_timeout <= 2147483),
    -- Postgres takes no less than 64 kB.
    work_mem_kb integer NOT NULL DEFAULT 4096 CHECK (work_mem_kb >= 64)
);
COMMENT ON COLUMN platform.tier_limits.overage_vcpu_hour IS 'dollars; null: not for sale';
COMMENT ON COLUMN platform.tier_limits.overage_gb_hour IS 'dollars; null: not for sale';
COMMENT ON COLUMN platform.tier_limits.max_databases IS 'null: unlimited';
COMMENT ON COLUMN platform.tier_limits.statement_timeout IS 'seconds; 0: unlimited';
COMMENT ON COLUMN platform.tier_limits.idle_in_transaction_timeout
    IS 'seconds; 0: unlimited';

INSERT INTO platform.tier_limits VALUES
    ('free', 5, 10, 1, false, 0, 5, 10, NULL, NULL, 1,
     '{community support}', 30, 60, 4096),
    ('starter', 10, 50, 10, true, 10, 25, 50, 0.15, 0.05, 3,
     '{email support,daily backups,real-time (Convex),Redis cache}',
     60, 300, 8192),
    ('pro', 50, 200, 100, true, 50, 200, 500, 0.12, 0.04, NULL,
     '{priority support,hourly backups,all types,custom domains,advanced analytics}',
     300, 600, 16384),
    ('enterprise', 200, 1000, 1000, true, 200, 1000, 2000, 0.10, 0.03, NULL,
     '{dedicated resources,99.9 % SLA,24/7 support,on-premise,compliance}',
     0, 3600, 65536);

CREATE TABLE platform.organizations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    handle text NOT NULL UNIQUE CHECK (handle ~ '^org_[a-z0-9_]{1,56}$'),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    tier text NOT NULL DEFAULT 'free' REFERENCES platform.tier_limits (name),
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    limiter_mode text NOT NULL DEFAULT 'enforce'
        CHECK (limiter_mode IN ('enforce', 'warn', 'off')),
    max_wait_ms integer NOT NULL DEFAULT 0 CHECK (max_wait_ms BETWEEN 0 AND 300000),
    connections_override integer CHECK (connections_override >= 0),
    -- All keys of an organisation share these, so that one SCRAM exchange can be
    -- tried against each of them (RFC 5802, section 5: the server sends them first).
    scram_salt bytea NOT NULL CHECK (length(scram_salt) >= 16),
    scram_iterations integer NOT NULL DEFAULT 4096
        CHECK (scram_iterations BETWEEN 4096 AND 1000000),
    tier_changed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    version bigint NOT NULL DEFAULT 0
);
CREATE INDEX organizations_tier ON platform.organizations (tier);
COMMENT ON COLUMN platform.organizations.connections_override
    IS 'null: as the tier says';
COMMENT ON COLUMN platform.organizations.version
    IS 'set by triggers; grows with every change of anything a proxy sees';

CREATE TABLE platform.database_credentials (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES platform.organizations (id) ON DELETE CASCADE,
    name text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 63),
    database_type text NOT NULL
        CHECK (database_type IN ('postgres', 'neon', 'convex', 'redis', 'mongodb')),
    -- A Fernet token always starts so: its version byte and the clock's high bytes.
    -- The check keeps a password in clear from being stored by mistake.
    connection_string text NOT NULL CHECK (connection_string LIKE 'gAAAA%'),
    pool_mode text NOT NULL DEFAULT 'auto'
        CHECK (pool_mode IN ('session', 'transaction', 'statement', 'auto')),
    is_active boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (org_id, name)
);

CREATE TABLE platform.api_keys (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id uuid NOT NULL REFERENCES platform.organizations (id) ON DELETE CASCADE,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    stored_key bytea NOT NULL CHECK (length(stored_key) = 32),
    server_key bytea NOT NULL CHECK (length(server_key) = 32),
    prefix text NOT NULL CHECK (length(prefix) BETWEEN 1 AND 16),
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_keys_org ON platform.api_keys (org_id);

-- Billing data and the audit outlive the organisation: no foreign keys.
CREATE TABLE platform.usage_metrics (
    org_id uuid NOT NULL,
    database_type text NOT NULL
        CHECK (database_type IN ('postgres', 'neon', 'convex', 'redis', 'mongodb')),
    vcpu_hours double precision NOT NULL DEFAULT 0,
    memory_gb_hours double precision NOT NULL DEFAULT 0,
    query_count bigint NOT NULL DEFAULT 0,
    rows bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    storage_gb double precision NOT NULL DEFAULT 0,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL CHECK (period_end > period_start),
    PRIMARY KEY (org_id, database_type, period_start)
);
CREATE INDEX usage_metrics_period ON platform.usage_metrics (period_start);

CREATE TABLE platform.events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    org_id uuid,
    action text NOT NULL,
    details jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX events_org ON platform.events (org_id, at);

-- The trigger functions run as their owner: whoever may write a row may also
-- have the change announced, without rights on the sequence and the other tables.

CREATE FUNCTION platform.organization_changing() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.tier <> OLD.tier THEN
        -- Waits for a running change of that tier, which otherwise would not see
        -- this organisation and so would not raise its version.
        PERFORM FROM platform.tier_limits WHERE name = NEW.tier FOR SHARE;
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.tier <> OLD.tier THEN
        NEW.tier_changed_at := now();
    END IF;
    -- The row is locked by now, so its versions rise in the order of commits.
    NEW.version := nextval('platform.change_version');
    RETURN NEW;
END $$;

CREATE FUNCTION platform.organization_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify('platform_changes', 'org:' || OLD.handle);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_notify('platform_changes', 'org:' || NEW.handle);
    END IF;
    RETURN NULL;
END $$;

-- Of an API key or a database.
CREATE FUNCTION platform.organization_part_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
    touched text;
BEGIN
    FOR touched IN
        UPDATE platform.organizations SET version = version
        WHERE id IN (OLD.org_id, NEW.org_id) RETURNING handle
    LOOP
        PERFORM pg_notify('platform_changes', 'org:' || touched);
    END LOOP;
    RETURN NULL;
END $$;

CREATE FUNCTION platform.tier_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        UPDATE platform.organizations SET version = version WHERE tier = NEW.name;
    END IF;
    PERFORM pg_notify(
        'platform_changes', 'tier:' || CASE TG_OP WHEN 'DELETE' THEN OLD.name ELSE NEW.name END
    );
    RETURN NULL;
END $$;

CREATE FUNCTION platform.refuse_truncate() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    RAISE EXCEPTION 'TRUNCATE would not reach the running proxies: use DELETE';
END $$;

CREATE TRIGGER organization_changing BEFORE INSERT OR UPDATE
    ON platform.organizations
    FOR EACH ROW EXECUTE FUNCTION platform.organization_changing();
CREATE TRIGGER organization_added_or_removed AFTER INSERT OR DELETE
    ON platform.organizations
    FOR EACH ROW EXECUTE FUNCTION platform.organization_changed();
-- A raised version alone was announced by what raised it: once for a tier, not
-- once for each of its organisations.
CREATE TRIGGER organization_changed AFTER UPDATE
    ON platform.organizations
    FOR EACH ROW
    WHEN ((to_jsonb(OLD) - 'version') IS DISTINCT FROM (to_jsonb(NEW) - 'version'))
    EXECUTE FUNCTION platform.organization_changed();

CREATE TRIGGER database_changed AFTER INSERT OR UPDATE OR DELETE
    ON platform.database_credentials
    FOR EACH ROW EXECUTE FUNCTION platform.organization_part_changed();

CREATE TRIGGER key_added_or_removed AFTER INSERT OR DELETE
    ON platform.api_keys
    FOR EACH ROW EXECUTE FUNCTION platform.organization_part_changed();
-- last_used_at is written often and means nothing to a proxy.
CREATE TRIGGER key_changed AFTER UPDATE
    ON platform.api_keys
    FOR EACH ROW
    WHEN ((to_jsonb(OLD) - 'last_used_at')
          IS DISTINCT FROM (to_jsonb(NEW) - 'last_used_at'))
    EXECUTE FUNCTION platform.organization_part_changed();

CREATE TRIGGER tier_added_or_removed AFTER INSERT OR DELETE
    ON platform.tier_limits
    FOR EACH ROW EXECUTE FUNCTION platform.tier_changed();
CREATE TRIGGER tier_changed AFTER UPDATE
    ON platform.tier_limits
    FOR EACH ROW
    WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION platform.tier_changed();

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON platform.tier_limits
    FOR EACH STATEMENT EXECUTE FUNCTION platform.refuse_truncate();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON platform.organizations
    FOR EACH STATEMENT EXECUTE FUNCTION platform.refuse_truncate();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON platform.database_credentials
    FOR EACH STATEMENT EXECUTE FUNCTION platform.refuse_truncate();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON platform.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION platform.refuse_truncate();
