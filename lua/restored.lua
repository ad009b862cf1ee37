#!lua flags=allow-oom
-- restored: begin another generation of the shard: an operator has brought back older data, so whatever anybody was
-- acknowledged may be lost. Who learns of it takes a new epoch, and publishes again what it has.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- returns    the new generation
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room
-- cost       TIME, HSET
-- @include guard
-- @include writes
local time = redis.call('TIME')
local created = time[1] .. '.' .. time[2]
redis.call('HSET', KEYS[1], 'created', created)
return answer(created)
