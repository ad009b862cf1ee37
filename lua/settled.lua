#!lua flags=allow-oom
-- settled: the other server was told to keep what of a node became cold, if that still is what was to be settled. What
-- the tree has dropped meanwhile has to go there after all.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    the node's head, in hex
-- ARGV[3]    the chunks that the server was told to keep, 16 bytes each
-- returns    1 when settled, 0 when more has become cold meanwhile
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it takes no room to speak of
-- cost       an HGET and an HDEL, an HMGET a node, an SADD a chunk that is gone
-- @include guard
-- @include keys
-- @include walk
-- @include payload
local head, chunks, at = ARGV[2], ARGV[3], 0
if redis.call('HGET', base .. 'unsettled', head) ~= chunks then
  return 0
end
redis.call('HDEL', base .. 'unsettled', head)
while at < #chunks / 16 do
  local run, sizes = unpack(redis.call('HMGET', node_key(hex(chunks, at)), 'r', 'b:@cold'))
  local matched = run and match(run, chunks, at) or 0
  for i = 0, math.max(matched, 1) - 1 do
    if i >= matched or size_at(sizes or '', i) == 0 then
      redis.call('SADD', base .. 'trash', hex(chunks, at + i))
    end
  end
  at = at + math.max(matched, 1)
end
return 1
