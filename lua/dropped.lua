#!lua flags=allow-oom
-- dropped: the other server was told to drop a chunk's cold payload. If the tree has it cold all the same, because it
-- became so again meanwhile, that server has to be told to keep it after all.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the member of the trash
-- ARGV[3]    the chunk that it names, 16 bytes; "" when it names none
-- returns    1 when it is to be kept, else 0
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room to speak of
-- cost       three TYPE, an SREM, an SISMEMBER, an HSET
-- @include guard
-- @include writes
-- @include keys
-- @include lists
local member, chunk = ARGV[2], ARGV[3]
redis.call('SREM', base .. 'trash', member)
if chunk == '' or redis.call('SISMEMBER', base .. 'kept', hex(chunk)) == 0 then
  return answer(0)
end
redis.call('HSET', base .. 'unsettled', 'again:' .. hex(chunk), chunk)
return answer(1)
