#!lua flags=allow-oom
-- repair: correct the shard's counts, if they still are what the caller saw before it counted.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2..]  nodes, chunks, bytes, warm, cold, number of the newest log entry as the caller saw them; true nodes,
--            chunks, bytes, warm, cold
-- returns    1 when written, 0 when something changed meanwhile
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room
-- cost       an HMGET and an HSET
-- @include guard
-- @include writes
local seen = redis.call('HMGET', KEYS[1], 'nodes', 'chunks', 'bytes', 'warm', 'cold', 'log')
for i = 1, 6 do
  if (seen[i] or '0') ~= ARGV[i + 1] then
    return answer(0)
  end
end
local nodes, chunks, bytes, warm, cold = select(#ARGV - 4, unpack(ARGV))
redis.call('HSET', KEYS[1], 'nodes', nodes, 'chunks', chunks, 'bytes', bytes, 'warm', warm, 'cold', cold)
return answer(1)
