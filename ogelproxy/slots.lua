-- The connection slots of one organisation, over all hosts. One run per request.
--
-- KEYS  1 hash of the organisation: host -> 'slots number expiry firm'
--       2 hash: which run of this server keeps the slots, and since when
--       3 hash whose field `new` names a run before which nobody had a lease
-- ARGV  1 host, a name and a random epoch
--       2 number of the request: a host's requests count up
--       3 connections that it has
--       4 slots that its lease proves, 0 when the lease has run out
--       5 slots that it wants
--       6 the organisation's maximum
--       7 microseconds that a lease is kept here: 1.1 times what the host counts
-- Answers {slots kept for the host, of all hosts, microseconds until who waits should
-- ask again or 0, 1 when they are a lease}; the first is -1 when the request is older
-- than one that was answered.
--
-- Never over: slots are raised only up to the maximum less what every other host may
-- still use, and a host uses none that this hasn't kept for it for longer than it
-- counts. So it may forget nothing; a server that may have forgotten, since it was
-- started, replaced or emptied, raises nothing until all leases of before have run
-- out. What hosts have until then they say themselves.
local key, host, number = KEYS[1], ARGV[1], tonumber(ARGV[2])
local used, held = tonumber(ARGV[3]), tonumber(ARGV[4])
local wanted, maximum, keep = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local now, since, run = epoch(KEYS[2])
local learning = since + keep - now
if learning > 0 and redis.call('HGET', KEYS[3], 'new') == run then
  learning = 0
end

local others, mine, firm = 0, 0, 0
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  local slots, latest, expiry, is_firm =
    string.match(fields[i + 1], '^(%d+) (%d+) (%d+) (%d)$')
  -- A clock that stepped back makes no lease longer.
  local left = math.min(tonumber(expiry), now + keep) - now
  if fields[i] == host and number <= tonumber(latest) then
    return {-1, 0, 0, 0}
  elseif left <= 0 then
    redis.call('HDEL', key, fields[i])
  elseif fields[i] == host then
    mine, firm = tonumber(slots), tonumber(is_firm)
  else
    others = others + tonumber(slots)
    if left == keep then
      local value = string.format('%s %s %.0f %s', slots, latest, now + keep, is_firm)
      redis.call('HSET', key, fields[i], value)
    end
  end
end

local slots
if learning > 0 then
  -- What is noted here may be older than what the host knows. Who was cut off for
  -- longer than a lease knows nothing: it is believed for now, so that its places
  -- are not given away, and has to fit when all have spoken.
  slots = math.min(wanted, math.max(held, used))
  firm = held >= used and 1 or 0
else
  -- What was granted stays when the maximum is lowered.
  local kept = math.min(math.max(held, used), firm * mine)
  slots = math.max(math.min(wanted, maximum - others), kept)
  firm = 1
end

if slots > 0 then
  local value = string.format('%d %.0f %.0f %d', slots, number, now + keep, firm)
  redis.call('HSET', key, host, value)
  redis.call('PEXPIRE', key, math.ceil(keep / 1000) + 1000)
else
  slots = 0
  redis.call('HDEL', key, host)
end
local total = others + slots
local again = 0
if learning > 0 and slots < wanted and total < maximum then
  again = learning
end
return {slots, total, again, firm}
