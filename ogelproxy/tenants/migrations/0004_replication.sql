-- Replication connections pass where a tier has this feature.
UPDATE platform.tier_limits SET features = features || '{replication}'
WHERE name IN ('pro', 'enterprise') AND NOT 'replication' = ANY (features);
