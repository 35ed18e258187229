-- Fair use: what a tier gets of a server that others use too, and how much it may
-- have under way at once.

ALTER TABLE platform.tier_limits
    ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 10000),
    ADD COLUMN max_in_flight integer CHECK (max_in_flight >= 1);
COMMENT ON COLUMN platform.tier_limits.weight
    IS 'share of server connections, beside other tiers, where they are short';
COMMENT ON COLUMN platform.tier_limits.max_in_flight
    IS 'clients of an organisation with a query or transaction under way; null: unlimited';

-- Weights are in proportion to the tiers' connections. How much may be under way is
-- left without limit: only who knows the databases can tell what they stand.
UPDATE platform.tier_limits SET weight = seed.weight
FROM (VALUES ('free', 1), ('starter', 2), ('pro', 10), ('enterprise', 40))
    AS seed (name, weight)
WHERE tier_limits.name = seed.name;
