#!lua flags=allow-oom
-- stream: take, keep or give up the right to write what one engine's events say, and learn how far they are written.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the stream's key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the stream: the member whose coverage it tells, <worker>/<rank>
-- ARGV[3]    who asks: a name that nobody else has
-- ARGV[4]    how long the right lasts, ms; 0 gives it up
-- ARGV[5]    where the events come from, for people
-- returns    {who has the right or "", ms that it lasts yet, its number, where the events come from,
--             last message written or "", its digest, when the engine made it, epoch it was written under, state, how
--             often it was written}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room
-- cost       an HMGET and an HSET
-- @include guard
-- @include writes
-- @include keys
-- @include clock
local key, owner, ttl = base .. 's:' .. ARGV[2], ARGV[3], tonumber(ARGV[4])
local held, ends, number, source = unpack(redis.call('HMGET', key, 'o', 'u', 'f', 'w'))
local left = (tonumber(ends) or 0) - now
if ttl == 0 then
  if held == owner then
    redis.call('HDEL', key, 'o', 'u')
    held = ''
  end
elseif not held or held == owner or left <= 0 then
  if held ~= owner then
    number = (tonumber(number) or 0) + 1
  end
  held, left, source = owner, ttl, ARGV[5]
  redis.call('HSET', key, 'o', owner, 'u', ('%.0f'):format(now + ttl), 'f', number, 'w', source)
end
local seq, digest, at, epoch, state, writes = unpack(redis.call('HMGET', key, 'q', 'x', 't', 'p', 'g', 'n'))
return answer({ held or '', left, tonumber(number) or 0, source or '', seq or '', digest or '', at or '', epoch or '0',
  state or '', tonumber(writes) or 0 })
