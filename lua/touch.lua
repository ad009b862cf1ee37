#!lua flags=allow-oom
-- touch: these nodes were used: hits add up, access times only grow, leaves keep their place in the order of eviction.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the node keys and the leaves are derived from it and share its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2..]  head in hex, hits, last access in ms, for each node; at most 1,000 nodes
-- returns    how many of the nodes were there
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: leaves keep their order on a server that is full
-- cost       one HGET, HINCRBY, HSET and ZADD a node
-- @include guard
-- @include keys
redis.call('ZCARD', base .. 'leaves') -- fails here, before a hit is counted, if it is something else
local touched = 0
for i = 2, #ARGV, 3 do
  local head, hits, now = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local accessed = redis.call('HGET', node_key(head), 'a')
  if accessed then
    redis.call('HINCRBY', node_key(head), 'n', hits)
    if tonumber(now) > tonumber(accessed) then
      redis.call('HSET', node_key(head), 'a', now)
      redis.call('ZADD', base .. 'leaves', 'XX', 'GT', now, head)
    end
    touched = touched + 1
  end
end
return touched
