-- Takes a leaf out: its key, its place in its parent's junction, its share of the counts; tells the log.
-- A parent that lost its last child becomes a leaf, with the newer of both access times. Returns that parent or false.
local function unlink(head)
  local parent, run, accessed = unpack(redis.call('HMGET', node_key(head), 'p', 'r', 'a'))
  redis.call('DEL', node_key(head), junction_key(hex(run:sub(-16))))
  redis.call('ZREM', base .. 'leaves', head)
  redis.call('HINCRBY', KEYS[1], 'nodes', -1)
  redis.call('HINCRBY', KEYS[1], 'chunks', -#run / 16)
  redis.call('XADD', base .. 'log', 'MAXLEN', '~', 10000, '*', 'removed', head)
  local junction = junction_key(parent)
  redis.call('HDEL', junction, head)
  local owner = redis.call('HGET', junction, 'o')
  if not owner or redis.call('HLEN', junction) > 1 then
    return false
  end
  redis.call('DEL', junction)
  local newer = math.max(tonumber(accessed), tonumber(redis.call('HGET', node_key(owner), 'a') or accessed))
  redis.call('HSET', node_key(owner), 'a', ('%.0f'):format(newer))
  redis.call('ZADD', base .. 'leaves', newer, owner)
  return owner
end
