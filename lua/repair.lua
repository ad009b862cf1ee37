#!lua flags=allow-oom
-- repair: correct the shard's counts, if it still is as the caller saw it before it counted.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    nodes as the caller saw them
-- ARGV[3]    chunks, likewise
-- ARGV[4]    bytes, likewise
-- ARGV[5]    warm, likewise
-- ARGV[6]    cold, likewise
-- ARGV[7]    number of the newest log entry, likewise
-- ARGV[8..]  true nodes, chunks, bytes, warm, cold; then, for each count that is wrong, the last chunk of the node or
--            "root" for the roots, the holder, and the true number of the children that it covers
-- returns    1 when written, 0 when something changed meanwhile
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room to speak of
-- cost       an HMGET and an HSET, and one for each wrong count
-- @include guard
-- @include writes
-- @include keys
-- @include tally
local seen = redis.call('HMGET', KEYS[1], 'nodes', 'chunks', 'bytes', 'warm', 'cold', 'log')
for i, expected in ipairs({ ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7] }) do
  if (seen[i] and seen[i] ~= '' and seen[i] or '0') ~= expected then
    return answer(0)
  end
end
for i = 13, #ARGV, 3 do
  local key = counts_key(ARGV[i] == 'root' and '' or ARGV[i])
  if ARGV[i + 2] == '0' then
    redis.call('HDEL', key, ARGV[i + 1])
  else
    redis.call('HSET', key, ARGV[i + 1], ARGV[i + 2])
  end
end
local nodes, chunks, bytes, warm, cold = unpack(ARGV, 8)
redis.call('HSET', KEYS[1], 'nodes', nodes, 'chunks', chunks, 'bytes', bytes, 'warm', warm, 'cold', cold)
return answer(1)
