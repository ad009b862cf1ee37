#!lua flags=allow-oom
-- attach: write a hash unless it is there, and read what is there: the descriptor, or a shard's meta.
--
-- KEYS[1]    the hash: dp:ns:<ns>, or dp:{<ns>:<shard>}:meta
-- ARGV[1..]  field, value, field, value, ... of a new one
-- returns    {field, value, ...} as stored: "created" and those fields that are there
-- flags      allow-oom: a worker may join a server that is full
-- cost       EXISTS, HSET, TIME, HMGET
if redis.call('EXISTS', KEYS[1]) == 0 then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'created', time[1] .. '.' .. time[2], unpack(ARGV))
end
local names, reply = { 'created' }, {}
for i = 1, #ARGV, 2 do
  names[#names + 1] = ARGV[i]
end
for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(names))) do
  if value then
    reply[#reply + 1], reply[#reply + 2] = names[i], value
  end
end
return reply
