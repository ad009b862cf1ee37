#!lua flags=allow-oom
-- register: give a member an epoch that it never had; all that it published under an older one counts for nothing.
-- Epochs are not below the server's time: one that a restored server does not know of is not given again.
--
-- KEYS[1]    dp:{<ns>}:epochs, member to epoch; the other keys of the workers are derived from it and share its slot
-- ARGV[1]    the member: <worker>/<rank>
-- ARGV[2]    an epoch that the new one must be above: the member's own, after data were lost or older ones restored
-- ARGV[3]    how long its lease lasts, ms; 0 for none: it counts until it is registered again
-- ARGV[4..]  what it says of itself: field, value, ...
-- returns    the new epoch
-- errors     DPDAMAGED
-- flags      allow-oom: a worker may join a server that is full
-- cost       HGET, HSET, ZADD, SET; ZADD and HSET with a lease
-- @include clock
-- @include roster
local member, above, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZCARD', roster .. 'workers') -- fails here, before anything is written, if it is something else
redis.call('ZCARD', roster .. 'changes')
local current = redis.call('HGET', KEYS[1], member) or '0'
if not current:match('^%d+$') or #current > 15 then
  return redis.error_reply('DPDAMAGED the epoch of ' .. member .. ' is no number: ' .. current:sub(1, 20))
end
local epoch = math.max(tonumber(current) + 1, above + 1, now)
redis.call('ZREM', roster .. 'workers', member)
redis.call('DEL', roster .. 'w:' .. member)
redis.call('HDEL', roster .. 'voided', member)
redis.call('HSET', KEYS[1], member, ('%.0f'):format(epoch))
if current == '0' and above == 0 then
  redis.call('HSET', roster .. 'swept', member, ('%.0f'):format(epoch)) -- it has no older coverage
end
if ttl > 0 then
  hold(member, ttl, 4)
end
changed(member)
return epoch
