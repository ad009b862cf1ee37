#!lua
-- claim: say that a worker computes a chunk that nobody has, or learn who said so before; or take that back.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the claim's key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the chunk's hash, in hex
-- ARGV[3]    worker
-- ARGV[4]    how long it counts, ms; 0 takes it back
-- returns    {worker that has the claim or "", since when in ms of the server's clock, how long it counts yet in ms}
-- errors     DPGONE, DPSCHEMA
-- flags      none (writes; a server that is out of memory refuses it)
-- cost       a GET, and a SET or DEL
-- @include guard
-- @include writes
-- @include keys
-- @include clock
local key, worker, ttl = base .. 'claim:' .. ARGV[2], ARGV[3], tonumber(ARGV[4])
local since, owner = (redis.call('GET', key) or ''):match('^(%d+) (.*)$')
if ttl == 0 then
  if owner == worker then
    redis.call('DEL', key)
  end
  return answer({ '', 0, 0 })
end
local left = owner and redis.call('PTTL', key) or -1
if owner ~= worker and left > 0 then -- one without an end is nobody's: it would never end
  return answer({ owner, count_of(since), left })
end
local began = owner == worker and since or ('%.0f'):format(now)
redis.call('SET', key, began .. ' ' .. worker, 'PX', ttl)
return answer({ worker, tonumber(began), ttl })
