-- What every script that grants something begins with: the time, and which run of this
-- server grants, since when. Each is put before the scripts that use it (redis.py).
--
-- What was granted by another run, or before what is noted here was lost, is not known
-- to this one. So it waits, from `since` on, for as long as such grants may last. A
-- server that was restarted, emptied or replaced by its replica is another run, or has
-- lost the note: all three are alike.
--
-- Returns now and since in microseconds, and the run's id.
local function epoch(key)
  local time = redis.call('TIME')
  local now = time[1] * 1000000 + time[2]
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local noted = redis.call('HMGET', key, 'run', 'since')
  local since = tonumber(noted[2])
  if noted[1] ~= run or now < since then
    since = now
    redis.call('HSET', key, 'run', run, 'since', string.format('%.0f', now))
  end
  return now, since, run
end
