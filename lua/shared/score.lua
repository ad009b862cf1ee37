-- The order of eviction is the namespace's: its policy, and how much longer hot nodes stay. A policy is a function of
-- (last access in ms, hits, depth, size); the leaf with the least score goes first. Each is a file in lua/policies.
local policy, hot_hits, hot_ms = unpack(redis.call('HMGET', KEYS[1], 'policy', 'hot_hits', 'hot_ms'))

hot_hits, hot_ms = count_of(hot_hits, math.huge), count_of(hot_ms)

local function score(accessed, hits, depth, size)
  accessed, hits = count_of(accessed), count_of(hits)
  local value = (policies[policy] or policies.lru)(accessed, hits, count_of(depth), size)
  return ('%.3f'):format(value + (hits >= hot_hits and hot_ms or 0))
end

-- Moves a leaf back in the order of eviction, never forward: a lease may have moved it further.
local function rank(head, accessed, hits, depth, size)
  redis.call('ZADD', base .. 'leaves', 'XX', 'GT', score(accessed, hits, depth, size), head)
end
