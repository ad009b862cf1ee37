#!lua flags=allow-oom
-- heartbeat: a member lives, its lease goes on. On the way, members whose leases ended long ago are made void.
--
-- KEYS[1]    dp:{<ns>}:epochs; the other keys of the workers are derived from it and share its slot
-- ARGV[1]    the member: <worker>/<rank>
-- ARGV[2]    its epoch
-- ARGV[3]    how long its lease lasts from now, ms
-- ARGV[4]    how long after the end of its lease a member may come back with what it published, ms
-- ARGV[5..]  what it says of itself: field, value, ...
-- returns    members made void
-- errors     DPSTALE
-- flags      allow-oom: the living stay known on a server that is full
-- cost       HGET, ZSCORE, ZADD, HSET, ZRANGE
-- @include clock
-- @include roster
local member, epoch, ttl, grace = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local current, most, leases = redis.call('HGET', KEYS[1], member) or '0', 16, roster .. 'workers'
if current ~= epoch then
  return redis.error_reply('DPSTALE ' .. member .. ' has epoch ' .. current .. ', not ' .. epoch)
end
hold(member, ttl, 5)
local dead = redis.call('ZRANGE', leases, '-inf', ('%.0f'):format(now - grace), 'BYSCORE', 'LIMIT', 0, most)
for _, each in ipairs(dead) do
  void(each)
end
return #dead
