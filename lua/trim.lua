#!lua flags=allow-oom
-- trim: a holder no longer has a chain beyond its first `keep` chunks. Coverage shrinks; what nobody covers goes.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    holder
-- ARGV[3]    epoch of the holder
-- ARGV[4]    how many leading chunks of the chain the holder keeps
-- ARGV[5]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run; its first chunk is a node's head
-- returns    {chunks of coverage taken away, nodes removed, chunks removed}
-- errors     DPGONE, DPSCHEMA, DPSTALE, DPDAMAGED
-- flags      allow-oom: it only makes room
-- cost       one HMGET a node on the path, one HGETALL a node behind `keep`, deepest first
-- @include guard
-- @include keys
-- @include walk
-- @include path
-- @include unlink
local holder, epoch, keep, chain = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

local path, failure = read_path(chain, holder, epoch)
if not path then
  return failure
end
redis.call('ZCARD', base .. 'leaves')
redis.call('XLEN', base .. 'log')

-- The longest coverage that anyone has of a node: chunks behind it are kept by nobody.
local function longest_coverage(node)
  local longest, fields = 0, redis.call('HGETALL', node_key(node.head))
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 'h:' then
      longest = math.max(longest, tonumber(fields[i + 1]:match('%d+$')))
    end
  end
  return longest
end

local taken, nodes, chunks = 0, 0, 0
for i = #path, 1, -1 do
  local node, key = path[i], node_key(path[i].head)
  local left = math.max(0, math.min(node.covered, keep - node.first))
  if left == 0 and node.held then
    redis.call('HDEL', key, 'h:' .. holder, 'b:' .. holder)
  elseif left < node.covered then
    redis.call('HSET', key, 'h:' .. holder, epoch .. ':' .. left)
    redis.call('HSET', key, 'b:' .. holder, node.ids:sub(1, left * 4))
  end
  taken = taken + node.covered - left
  local last = hex(node.run:sub(-16))
  if left < node.covered and redis.call('HLEN', junction_key(last)) == 0 then
    local longest = longest_coverage(node)
    if longest == 0 then
      unlink(node.head)
      nodes, chunks = nodes + 1, chunks + node.size
    elseif longest < node.size then
      redis.call('HSET', key, 'r', slice(node.run, 0, longest))
      redis.call('HINCRBY', KEYS[1], 'chunks', longest - node.size)
      redis.call('XADD', base .. 'log', 'MAXLEN', '~', 10000, '*', 'trimmed', node.head)
      chunks = chunks + node.size - longest
    end
  end
end
return { taken, nodes, chunks }
