#!lua flags=allow-oom
-- lease: protect a chain from eviction for a while, or end that. Only the node that the chain ends in is marked: what
-- lies above a node stays as long as it does.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    name of the lease
-- ARGV[3]    how long, ms; 0 ends it
-- ARGV[4]    the chain, 16 bytes a chunk, at most 4,096 and one run; begins at a node's head
-- returns    {leading chunks that are there, and protected now, when the lease ends in ms of the server's clock, first
--            chunk of the node that the next call begins with when this one stopped for its budget, else -1: then
--            nothing is protected yet}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: what is used now stays on a server that is full
-- cost       one HGET a node, at most about 400; one HSET and ZADD
-- @include guard
-- @include writes
-- @include keys
-- @include budget
-- @include clock
-- @include policies
-- @include score
-- @include walk
-- @include leases
local name, ttl, chain = 'l:' .. ARGV[2], tonumber(ARGV[3]), ARGV[4]
local first, total, leaves, deepest, covered = 0, #chain / 16, base .. 'leaves', nil, 0
redis.call('ZCARD', leaves)
while first < total do
  local head = hex(chain, first)
  local run = redis.pcall('HGET', node_key(head), 'r') or ''
  run = type(run) == 'string' and run or ''
  local matched = #run % 16 == 0 and match(run, chain, first) or 0
  if matched == 0 then
    break
  elseif ttl == 0 and redis.call('HDEL', node_key(head), name) == 1 and redis.call('ZSCORE', leaves, head) then
    local accessed, hits, depth = unpack(redis.call('HMGET', node_key(head), 'a', 'n', 'd'))
    redis.call('ZADD', leaves, score(accessed, hits, depth, #run / 16), head)
  end
  deepest, covered, first = head, matched, first + matched
  spend(0.5)
  if matched * 16 < #run then
    break
  elseif first < total and is_spent() then
    return answer({ first, now + ttl, first - matched })
  end
end
local ends = now + ttl
if deepest and ttl > 0 then
  local before = redis.call('HGET', node_key(deepest), name) or ':0'
  covered = math.max(covered, math.min(count_of(before:match('%d+$')), 256))
  if redis.call('HLEN', node_key(deepest)) > 64 then
    local place = ('%.0f'):format(now % 1048573) -- some fields a call, wherever: of a node with thousands of holders
    leased_until(deepest, redis.call('HSCAN', node_key(deepest), place, 'MATCH', 'l:*', 'COUNT', 128)[2])
  end
  redis.call('HSET', node_key(deepest), name, ('%.0f:%d'):format(ends, covered))
end
return answer({ first, ends, -1 })
