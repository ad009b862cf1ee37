-- The longest coverage that anyone has of a node: a leaf's chunks behind it are kept by nobody.
local function longest_coverage(head)
  local longest, fields = 0, redis.call('HGETALL', node_key(head))
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 'h:' then
      longest = math.max(longest, tonumber(fields[i + 1]:match('%d+$')))
    end
  end
  return longest
end

-- The holder keeps the first `keep` chunks of a node at most. A leaf that nobody covers goes, one that nobody covers to
-- its end is cut. Returns chunks of coverage taken away, nodes removed, chunks removed.
local function uncover(head, run, holder, keep)
  local key = node_key(head)
  local held, ids = unpack(redis.call('HMGET', key, 'h:' .. holder, 'b:' .. holder))
  local epoch, covered = (held or '0:0'):match('^(%d+):(%d+)$')
  local left = math.min(tonumber(covered), keep)
  if left == 0 then
    redis.call('HDEL', key, 'h:' .. holder, 'b:' .. holder)
  elseif left < tonumber(covered) then
    redis.call('HSET', key, 'h:' .. holder, epoch .. ':' .. left)
    if ids then
      redis.call('HSET', key, 'b:' .. holder, ids:sub(1, left * 4))
    end
  end
  local nodes, chunks, size = 0, 0, #run / 16
  if redis.call('HLEN', junction_key(hex(run:sub(-16)))) == 0 then
    local longest = longest_coverage(head)
    if longest == 0 then
      unlink(head)
      nodes, chunks = 1, size
    elseif longest < size then
      redis.call('HSET', key, 'r', slice(run, 0, longest))
      redis.call('HDEL', key, 'm') -- of a prompt that ended behind the cut
      redis.call('HINCRBY', KEYS[1], 'chunks', longest - size)
      redis.call('XADD', base .. 'log', 'MAXLEN', '~', 10000, '*', 'trimmed', head)
      chunks = size - longest
    end
  end
  return tonumber(covered) - left, nodes, chunks
end
