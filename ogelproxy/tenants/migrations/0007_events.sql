-- Events travel: each has a key that never changes, by which it is stored once, and is
-- copied to MongoDB where there is one. `audit` is what operators did, `analytics` what
-- tenants met.
ALTER TABLE platform.events
    ADD COLUMN kind text NOT NULL DEFAULT 'audit'
        CHECK (kind IN ('audit', 'analytics')),
    ADD COLUMN key text NOT NULL DEFAULT gen_random_uuid()::text UNIQUE,
    ADD COLUMN forwarded_at timestamptz;
COMMENT ON COLUMN platform.events.forwarded_at IS 'null: not copied to MongoDB';
CREATE INDEX events_to_forward ON platform.events (id) WHERE forwarded_at IS NULL;

-- Here, so that a plain SQL UPDATE leaves it too, and once, however many proxies see it.
CREATE FUNCTION platform.organization_tier_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    INSERT INTO platform.events (kind, actor, org_id, action, details) VALUES (
        'analytics', 'sql:' || session_user, NEW.id, 'tier.changed',
        jsonb_build_object('before', OLD.tier, 'after', NEW.tier)
    );
    RETURN NULL;
END $$;

CREATE TRIGGER organization_tier_changed AFTER UPDATE ON platform.organizations
    FOR EACH ROW WHEN (OLD.tier <> NEW.tier)
    EXECUTE FUNCTION platform.organization_tier_changed();
