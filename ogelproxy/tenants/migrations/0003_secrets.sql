-- What the proxies of one control plane share and nobody else may know.
CREATE TABLE platform.secrets (
    name text PRIMARY KEY,
    value bytea NOT NULL CHECK (length(value) >= 32)
);

-- Salts of organisations that don't exist are made from it. It never changes, or
-- those salts would, and real ones would not. A random uuid has 122 random bits.
INSERT INTO platform.secrets (name, value) VALUES (
    'mock_salt',
    decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex')
);
