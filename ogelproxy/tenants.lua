-- Keep what is known of a tenant, unless something newer is kept; say what is new.
--
-- KEYS[1]  the tenant's key
-- ARGV[1]  the entry: VERSION LETTER TOKEN, r for a record, d for a deletion
-- ARGV[2]  seconds until it is forgotten
-- ARGV[3]  the channel of changes
-- ARGV[4]  the tenant's handle
--
-- Returns 1 if it was kept.

local function read(entry)
    local version, letter = string.match(entry, '^(%d+) ([rd]) ')
    -- What doesn't look like an entry is older than all.
    return tonumber(version or -1), letter or 'r'
end

local version, letter = read(ARGV[1])
local kept = redis.pcall('GETRANGE', KEYS[1], 0, 31)
-- What is no text is somebody's mistake.
local kept_version, kept_letter = read(type(kept) == 'string' and kept or '')
local ttl = tonumber(ARGV[2])

local function say()
    local said = ARGV[4] .. ' ' .. string.match(ARGV[1], '^%d+')
    if letter == 'd' then
        said = said .. ' gone'
    end
    redis.call('PUBLISH', ARGV[3], said)
end

if version < kept_version then
    if letter == 'd' then
        -- Who kept the newer one may have read it before the deletion.
        say()
    end
    return 0
end
if version == kept_version then
    if letter == 'r' and kept_letter == 'd' then
        return 0
    end
    if letter == kept_letter then
        -- It is a renewal, and nothing that anybody has to know.
        if redis.call('TTL', KEYS[1]) > ttl / 2 then
            return 0
        end
        redis.call('SET', KEYS[1], ARGV[1], 'EX', ttl)
        return 1
    end
end

if letter == 'r' and kept_letter == 'd' then
    -- Either the handle was given anew, or this was read before the deletion by one
    -- who is late: in Redis the deletion stands for as long as anyone can be late.
    say()
    return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ttl)
say()
return 1
