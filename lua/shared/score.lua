-- The order of eviction is the namespace's: its policy, and how much longer hot nodes stay. A policy is a function of
-- (last access in ms, hits, depth, size); the leaf with the least score goes first. Each is a file in lua/policies.
local policy, hot_hits, hot_ms = unpack(redis.call('HMGET', KEYS[1], 'policy', 'hot_hits', 'hot_ms'))

local function score(accessed, hits, depth, size)
  accessed, hits = tonumber(accessed) or 0, tonumber(hits) or 0
  local value = (policies[policy] or policies.lru)(accessed, hits, tonumber(depth) or 0, size)
  return ('%.3f'):format(value + (hits >= tonumber(hot_hits or 'inf') and tonumber(hot_ms) or 0))
end

-- Moves a leaf back in the order of eviction, never forward: a lease may have moved it further.
local function rank(head, accessed, hits, depth, size)
  redis.call('ZADD', base .. 'leaves', 'XX', 'GT', score(accessed, hits, depth, size), head)
end
