#!lua flags=allow-oom
-- settled: the other server was told to keep what of a node became cold, if that still is what was to be settled. What
-- the tree has dropped meanwhile has to go there after all.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the node's head, in hex
-- ARGV[3]    the chunks that the server was told to keep, 16 bytes each
-- returns    1 when settled, 0 when more has become cold meanwhile
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room to speak of
-- cost       three TYPE, an HGET and an HDEL, an SISMEMBER a chunk, an SADD for one that is gone
-- @include guard
-- @include writes
-- @include keys
-- @include lists
local head, chunks, done = ARGV[2], ARGV[3], 0
if redis.call('HGET', base .. 'unsettled', head) == chunks then
  done = redis.call('HDEL', base .. 'unsettled', head)
end
if #chunks % 16 > 0 or #chunks > 4096 then
  return answer(done) -- no node has such chunks: nothing is to be settled
end
-- Whoever told the server to keep them may have come late: the tree dropped them, and another one emptied the trash.
for at = 0, #chunks / 16 - 1 do
  if redis.call('SISMEMBER', base .. 'kept', hex(chunks, at)) == 0 then
    redis.call('SADD', base .. 'trash', hex(chunks, at))
  end
end
return answer(done)
