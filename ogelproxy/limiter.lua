-- Grants leases on one organisation's bucket. See docs/limits.md for the proof.
--
-- Contract: over every window of d seconds all hosts together take at most B + r*d
-- tokens. Two things are kept: the trickles granted never exceed r, and the level
-- refills only by what they leave; and level + what may be in hands or come back
-- <= B. In hands are chunks and what trickles hold; what a trickle might have minted
-- and didn't comes back when its host says so. A host holds no more than is noted
-- here, and forgets it earlier than this does.
--
-- KEYS  1 the bucket, 2 the hosts (see hosts.lua), 3 the run of this server, and since
--       when it is known (see epoch.lua)
-- ARGV  1 host, 2 sequence number, 3 tokens it holds, 4 tokens it lacks,
--       5 demand per second, 6 r, 7 B, 8 version of these two,
--       9 microseconds of a trickle, 10 of a chunk, 11 sequence number by which it
--       got its latest trickle, 0 for none, -1 when it doesn't know any more,
--       12 tokens it minted by that, 13 tokens it gives back,
--       14 floor's hosts, 15 share of the floor
-- Returns tokens granted, tokens to discard, a trickle's rate and capacity, and the
-- microseconds in which asking again is in vain; nothing for a stale request.
local host, seq = ARGV[1], tonumber(ARGV[2])
local held, need, demand = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local r, B, version = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local P, ttl = tonumber(ARGV[9]), tonumber(ARGV[10])
local trickle, minted = tonumber(ARGV[11]), tonumber(ARGV[12])
local returned = tonumber(ARGV[13])
local floor_hosts, floor_share = tonumber(ARGV[14]), tonumber(ARGV[15])

-- What a host counts from before it asked is counted here from now on and for a
-- tenth longer: rates of clocks that differ by less than that do no harm.
local LONGER = 1.1
-- A host that asked within so many microseconds has a share in what there is, and
-- after so many it is forgotten.
local RECENT, FORGOTTEN = 2 * P, 10000000
-- For so many microseconds after its end what a trickle didn't mint may come back.
local CLAIMED = 1000000
-- Shortest wait that is told; so few questions can be asked in vain.
local SHORTEST = 10000

local now, since, run = epoch(KEYS[3])
local complete = redis.call('HGET', KEYS[2], 'complete') == run

-- The floor: what the first hosts mint without asking is not granted here. Until all
-- are known to have told of themselves, each counts as there.
local floors = floor_hosts
if floor_hosts > 0 and complete then
  floors = 0
  for number = 0, floor_hosts - 1 do
    local taken = redis.call('HGET', KEYS[2], number)
    if taken and tonumber(string.match(taken, '%S+$')) > now then floors = floors + 1 end
  end
end

local raw = redis.call('HGETALL', KEYS[1])
local kept, hosts = {}, {}
for i = 1, #raw, 2 do
  local name = string.match(raw[i], '^h:(.*)')
  if name then
    local v = {}
    for number in string.gmatch(raw[i + 1], '%S+') do v[#v + 1] = tonumber(number) end
    hosts[name] = {
      seq = v[1], chunk = v[2], chunk_until = v[3], rate = v[4], rate_at = v[5],
      rate_until = v[6], capacity = v[7], unminted = v[8], trickle = v[9],
      demand = v[10], at = v[11],
    }
  else
    kept[raw[i]] = raw[i + 1]
  end
end

-- The newest limits hold, whoever brings them.
if kept.v and tonumber(kept.v) > version then
  version, r, B = tonumber(kept.v), tonumber(kept.r), tonumber(kept.b)
end
local reserved = 0
if floor_hosts > 0 then reserved = floor_share * floors / floor_hosts end
local rate, capacity = r * (1 - reserved), B * (1 - reserved)

local level, at
if kept.run == run then
  level, at = tonumber(kept.l), tonumber(kept.t)
elseif complete or not kept.run and now > since + ttl * LONGER then
  level, at, hosts = capacity, now, {}
else
  -- Redis lost its memory, or a part of it: everything may be in the hands of hosts
  -- unknown, for as long as leases of before it was known last.
  level, at, hosts = 0, since, {}
  hosts['?'] = {
    seq = 0, chunk = capacity, chunk_until = since + ttl * LONGER, rate = rate,
    rate_at = since, rate_until = since + P * LONGER, capacity = 0, unminted = 0,
    trickle = 0, demand = 0, at = now, has_changed = true,
  }
end
if now < at then now = at end -- a clock that steps back refills nothing

-- Refill by what trickles leave, beside what is out.
local function refill(until_then)
  local out, trickled = 0, 0
  for _, h in pairs(hosts) do
    out = out + h.chunk + h.capacity + h.unminted
    trickled = trickled + h.rate * math.max(0, math.min(h.rate_until, until_then) - at)
  end
  local minted = math.max(0, rate * (until_then - at) - trickled) / 1000000
  level = math.max(0, math.min(capacity - out, level + minted))
  at = until_then
end

-- What has run out counts as out up to the latest end of any, and no longer.
local ended = at
for _, h in pairs(hosts) do
  for _, moment in ipairs({h.chunk_until, h.rate_until, h.rate_until + CLAIMED}) do
    if moment <= now then ended = math.max(ended, moment) end
  end
end
refill(ended)
for name, h in pairs(hosts) do
  if h.capacity > 0 and h.rate_until <= now then
    h.capacity, h.has_changed = 0, true
  end
  if h.rate > 0 and h.rate_until + CLAIMED <= now then
    h.rate, h.unminted, h.has_changed = 0, 0, true
  end
  if h.chunk > 0 and h.chunk_until <= now then h.chunk, h.has_changed = 0, true end
  if h.chunk == 0 and h.rate == 0 and now - h.at > FORGOTTEN then
    hosts[name] = nil
    redis.call('HDEL', KEYS[1], 'h:' .. name)
  end
end
refill(now)

local me = hosts[host] or {
  seq = 0, chunk = 0, chunk_until = 0, rate = 0, rate_at = 0, rate_until = 0,
  capacity = 0, unminted = 0, trickle = 0,
}
hosts[host] = me
if seq <= me.seq then return {} end
-- It ended its trickle before it asked; what that left is a part of what it holds. Of
-- a trickle that it never heard of it minted nothing; of one that it forgot, perhaps
-- all.
if trickle < 0 then
  me.unminted = 0
elseif me.trickle ~= trickle then
  minted = 0
end
local mintable = me.rate * (math.min(me.rate_until, now) - me.rate_at) / 1000000
level = level + math.max(0, math.min(me.unminted, mintable - minted))
local known = me.chunk + me.capacity
returned = math.max(0, math.min(returned, known - held))
level = level + returned
me.seq, me.chunk = seq, math.min(held, known - returned)
me.rate, me.capacity, me.unminted, me.trickle = 0, 0, 0, 0
me.demand, me.at = math.max(demand, need), now
local discarded = held - me.chunk

local wanted, rates, asking, out = 0, 0, 0, 0
local next_end = now + P * LONGER
for _, h in pairs(hosts) do
  if now - h.at < RECENT then
    wanted = wanted + h.demand
    if now - h.at < P then asking = asking + 1 end
  end
  if h.rate > 0 and h.rate_until > now then
    rates = rates + h.rate
    next_end = math.min(next_end, h.rate_until)
  end
  out = out + h.chunk + h.capacity + h.unminted
end
local share = wanted > 0 and me.demand / wanted or 1

-- A chunk: what it needs at once, for a period; more while there is plenty, so that
-- who wants little doesn't have to ask for each.
local want = math.max(need, math.floor(me.demand * P / 1000000))
local granted = 0
if need > 0 and level >= need then
  local plenty = math.min(level / 4, 4 * want + 8)
  granted = math.floor(math.min(level,
    math.max(need, math.min(want, level * share), plenty)))
end
level = level - granted
me.chunk = me.chunk + granted
me.chunk_until = now + ttl * LONGER

-- A trickle: its share of the rate, if that is worth the name.
local room = capacity - level - out - granted
if granted < want and level < math.max(need, want / 4) then
  local offered = math.min(rate * share, rate - rates)
  local holds = math.max(1, offered * 0.04)
  if offered * P >= 2000000 and (granted > 0 or holds >= need) and holds <= room then
    me.rate, me.rate_at, me.rate_until = offered, now, now + P * LONGER
    me.capacity, me.trickle = holds, seq
    me.unminted = math.min(room - holds, offered * P * LONGER / 1000000)
  end
end

local wait = 0
if need > 0 and granted == 0 and me.rate == 0 then
  local left = rate - rates
  if left > 0 and room >= need then
    -- Hosts that want the same token take turns, so that they ask less often.
    wait = (need - level + (asking - 1) / 2) / left * 1000000
  else
    -- All is with others until a lease of theirs ends.
    wait = next_end - now
  end
  wait = math.max(SHORTEST, math.min(wait, math.max(P, 1000000 * need / rate)))
end

me.has_changed = true
for name, h in pairs(hosts) do
  if h.has_changed then
    redis.call('HSET', KEYS[1], 'h:' .. name, string.format(
      '%d %.9f %.0f %.9f %.0f %.0f %.9f %.9f %d %.3f %.0f', h.seq, h.chunk,
      h.chunk_until, h.rate, h.rate_at, h.rate_until, h.capacity, h.unminted,
      h.trickle, h.demand, h.at))
  end
end
redis.call('HSET', KEYS[1], 'l', string.format('%.9f', level),
  't', string.format('%.0f', now), 'run', run,
  'r', string.format('%.17g', r), 'b', string.format('%.17g', B), 'v', version)
-- After that the bucket is full, whatever happened.
redis.call('PEXPIRE', KEYS[1], math.ceil(B / r * 1000) + 20000)
return {
  granted, string.format('%.9f', discarded), string.format('%.9f', me.rate),
  string.format('%.9f', me.capacity), math.ceil(wait),
}
