#!lua flags=allow-oom
-- used: note that a process uses the namespace now, by the server's clock.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- returns    the server's time in ms
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room to speak of
-- cost       a TIME and an HSET
-- @include guard
-- @include reads
-- @include clock
local text = ('%.0f'):format(now)
redis.call('HSET', KEYS[1], 'used', text)
return answer(text)
