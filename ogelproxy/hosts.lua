-- Gives a host its number, or renews it. The first hosts by number may mint a part
-- of every limit without asking (see limiter.lua).
--
-- KEYS  1 the hosts: by number, a name and the microseconds until when it is taken
--       2 the run of this server, and since when it is known (see epoch.lua)
-- ARGV  1 name, 2 the number it has, or -1, 3 how many there may be, 4 microseconds
--       that this one is kept without being renewed, 5 that any is kept at most
-- Returns the number, or -1 when it gets none for now.
local name, had = ARGV[1], tonumber(ARGV[2])
local most, keep = tonumber(ARGV[3]), tonumber(ARGV[4])
local longest = tonumber(ARGV[5])

local now, since, run = epoch(KEYS[2])

-- A Redis that lost its memory doesn't know who uses which number. By the time that
-- numbers are kept for, each has told or lost its own.
local is_complete = redis.call('HGET', KEYS[1], 'complete') == run
if not is_complete and now > since + longest * 1.1 then
  redis.call('HSET', KEYS[1], 'complete', run)
  is_complete = true
end

local mine, free
for number = most - 1, 0, -1 do
  local owner, taken_until
  local taken = redis.call('HGET', KEYS[1], number)
  if taken then owner, taken_until = string.match(taken, '(%S+) (%S+)') end
  if owner == name then
    mine = number
  elseif not owner or tonumber(taken_until) <= now then
    if number == had and not mine then mine = number end
    if is_complete then free = number end
  end
end
mine = mine or free
if not mine then return -1 end
redis.call('HSET', KEYS[1], mine, name .. ' ' .. string.format('%.0f', now + keep * 1.1))
return mine
