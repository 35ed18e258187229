-- Fair use: what a tier gets of a server that others use too, and how much it may
-- have under way at once.

ALTER TABLE platform.tier_limits
    ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 10000),
    ADD COLUMN max_in_flight integer CHECK (max_in_flight >= 1);
COMMENT ON COLUMN platform.tier_limits.weight
    IS 'share of server connections, beside other tiers, where they are short';
COMMENT ON COLUMN platform.tier_limits.max_in_flight
    IS 'clients of an organisation with a query or transaction under way; null: unlimited';

-- Weights are in proportion to the tiers' connections. Half of the connections may be
-- at work: the others idle, except in somebody's run-away.
UPDATE platform.tier_limits SET weight = seed.weight, max_in_flight = seed.max_in_flight
FROM (VALUES ('free', 1, 3), ('starter', 2, 5), ('pro', 10, 25), ('enterprise', 40, 100))
    AS seed (name, weight, max_in_flight)
WHERE tier_limits.name = seed.name;
