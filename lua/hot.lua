#!lua flags=no-writes
-- hot: the candidates for pre-warming with the most hits.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    rank of the first, 0 for the hottest
-- ARGV[3]    how many, at most
-- returns    {hash of the last chunk, depth behind it, hits, accessed, created, head, ... for each}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       a ZREVRANGE, and an HMGET a node
-- @include guard
-- @include reads
-- @include keys
local reply, first, most = {}, tonumber(ARGV[2]), tonumber(ARGV[3])
for _, head in ipairs(redis.call('ZREVRANGE', base .. 'hot', first, first + most - 1)) do
  local run, depth, hits, accessed, created = unpack(redis.call('HMGET', node_key(head), 'r', 'd', 'n', 'a', 'c'))
  if run then
    for _, value in ipairs({ hex(run), depth + #run / 16, hits, accessed, created, head }) do
      reply[#reply + 1] = value
    end
  end
end
return answer(reply)
