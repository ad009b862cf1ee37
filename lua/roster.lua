#!lua flags=no-writes
-- roster: which epoch of every member counts, and when its lease ends.
--
-- KEYS[1]    dp:{<ns>}:epochs; the other keys of the workers are derived from it and share its slot
-- ARGV[1]    version that the caller knows: the answer is short when nothing has changed since; "" for all there is
-- returns    {now in ms of the server's clock, version, {member, epoch, ...}, {member, end of its lease in ms, ...}},
--            or the first two of these
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       GET; HGETALL and ZRANGE when something has changed
-- @include clock
local roster = KEYS[1]:sub(1, -7)
local version = redis.call('GET', roster .. 'version') or '0'
local reply = { ('%.0f'):format(now), version }
if version ~= ARGV[1] then
  reply[3] = redis.call('HGETALL', KEYS[1])
  reply[4] = redis.call('ZRANGE', roster .. 'workers', 0, -1, 'WITHSCORES')
end
return reply
