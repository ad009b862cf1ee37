#!lua flags=allow-oom
-- touch: record uses of nodes: hits add up, access times only grow, leaves move back in the order of eviction, and
-- nodes with enough hits become candidates for pre-warming.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    hits that make a candidate, 0 for never
-- ARGV[3..]  head in hex, hits, ms since the last use, for each node; Python sends 100 a call
-- returns    how many of the nodes were there
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: leaves keep their order on a server that is full
-- cost       one HMGET, HSTRLEN, HINCRBY, HSET and ZADD a node; another ZADD for a candidate
-- @include guard
-- @include writes
-- @include keys
-- @include clock
-- @include policies
-- @include score
local threshold, hot, most_candidates = tonumber(ARGV[2]), base .. 'hot', 1000
redis.call('ZCARD', base .. 'leaves') -- fails here, before a hit is counted, if it is something else
redis.call('ZCARD', hot)
local touched = 0

local function record(head, more, used)
  local accessed, depth = unpack(redis.pcall('HMGET', node_key(head), 'a', 'd'))
  if not accessed then
    return
  end
  local hits = redis.pcall('HINCRBY', node_key(head), 'n', more)
  if type(hits) ~= 'number' then
    hits, damaged = count_of(more), damaged + 1
    redis.call('HSET', node_key(head), 'n', more)
  end
  accessed = ('%.0f'):format(math.max(used, count_of(accessed)))
  redis.call('HSET', node_key(head), 'a', accessed)
  rank(head, accessed, hits, depth, redis.call('HSTRLEN', node_key(head), 'r') / 16)
  if threshold > 0 and hits >= threshold then
    redis.call('ZADD', hot, hits, head)
  end
  touched = touched + 1
end

for i = 3, #ARGV, 3 do
  record(ARGV[i], ARGV[i + 1], now - math.max(0, tonumber(ARGV[i + 2])))
end
redis.call('ZREMRANGEBYRANK', hot, 0, -most_candidates - 1)
return answer(touched)
