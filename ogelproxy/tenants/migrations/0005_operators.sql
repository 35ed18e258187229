-- Who may use the operators' console. Running proxies learn of changes as they do of
-- an organisation's, under the handle `ogel`, which no organisation can have.

-- One row: what all operators' keys share, as those of an organisation do.
CREATE TABLE platform.operators (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    scram_salt bytea NOT NULL CHECK (length(scram_salt) >= 16),
    scram_iterations integer NOT NULL DEFAULT 4096
        CHECK (scram_iterations BETWEEN 4096 AND 1000000),
    version bigint NOT NULL
);
INSERT INTO platform.operators (scram_salt, version) VALUES (
    decode(replace(gen_random_uuid()::text, '-', ''), 'hex'),
    nextval('platform.change_version')
);

CREATE TABLE platform.operator_keys (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    stored_key bytea NOT NULL CHECK (length(stored_key) = 32),
    server_key bytea NOT NULL CHECK (length(server_key) = 32),
    prefix text NOT NULL CHECK (length(prefix) BETWEEN 1 AND 16),
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz,
    revoked_at timestamptz
);

CREATE FUNCTION platform.operators_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    UPDATE platform.operators SET version = nextval('platform.change_version');
    PERFORM pg_notify('platform_changes', 'org:ogel');
    RETURN NULL;
END $$;

CREATE TRIGGER operator_key_added_or_removed AFTER INSERT OR DELETE
    ON platform.operator_keys
    FOR EACH STATEMENT EXECUTE FUNCTION platform.operators_changed();
-- last_used_at is written often and means nothing to a proxy.
CREATE TRIGGER operator_key_changed AFTER UPDATE
    ON platform.operator_keys
    FOR EACH ROW
    WHEN ((to_jsonb(OLD) - 'last_used_at')
          IS DISTINCT FROM (to_jsonb(NEW) - 'last_used_at'))
    EXECUTE FUNCTION platform.operators_changed();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON platform.operator_keys
    FOR EACH STATEMENT EXECUTE FUNCTION platform.refuse_truncate();
