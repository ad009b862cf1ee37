-- Takes a node out of its parent's junction, and out of what that counts. Returns the parent's head when the node was
-- its last child: the junction is removed then.
local function leave_junction(head, parent, flat, holders)
  local junction = junction_key(parent)
  local fields = redis.pcall('HLEN', junction)
  if type(fields) ~= 'number' then
    return nil
  end
  local owner = redis.call('HGET', junction, 'o')
  if owner and fields <= 2 + holders then
    redis.call('DEL', junction) -- the only child: all that is counted are its holders, of which there may be thousands
    return owner
  end
  redis.call('HDEL', junction, head)
  tally_all(parent, flat, -1)
  if not owner or redis.call('HLEN', junction) > 32 then
    return nil
  end
  for _, field in ipairs(redis.call('HKEYS', junction)) do
    if is_child(field) then
      return nil
    end
  end
  redis.call('DEL', junction)
  return owner
end

-- Takes a leaf out: its key, its place in its parent's junction, its share of the counts; tells the log.
-- A parent that lost its last child becomes a leaf, with the newer of both access times. Returns the chunks removed.
local function unlink(head, flat, node)
  local size = math.floor(#(node.r or '') / 16)
  redis.call('DEL', node_key(head))
  if size > 0 then
    disown(hex(node.r))
  end
  redis.call('ZREM', base .. 'leaves', head)
  redis.call('ZREM', base .. 'hot', head)
  local holders, extra, warm, cold = weigh(flat)
  account(-1, -size, -holders, -extra, -warm, -cold)
  release_all(node, 0)
  tell('removed', head)
  spend(6 + #flat / 50)
  local owner = leave_junction(head, node.p or '', flat, holders)
  if not owner then
    return size
  end
  local run, accessed, hits, depth = unpack(redis.pcall('HMGET', node_key(owner), 'r', 'a', 'n', 'd'))
  if is_run(owner, run) then
    local newer = ('%.0f'):format(math.max(count_of(node.a), count_of(accessed)))
    redis.call('HSET', node_key(owner), 'a', newer)
    redis.call('ZADD', base .. 'leaves', score(newer, hits, depth, #run / 16), owner)
  end
  return size
end

-- Cuts a leaf's tail off, and everybody's coverage of it. Returns the chunks cut.
local function shorten(head, keep, flat, node)
  local key, cut = node_key(head), math.floor(#node.r / 16) - keep
  local holders, extra, warm, cold = weigh(flat)
  release_all(node, keep)
  for name, value in pairs(node) do
    local epoch, covered = coverage_of(value)
    if name:sub(1, 2) == 'h:' and covered > keep then
      redis.call('HSET', key, name, epoch .. ':' .. keep)
    elseif name:sub(1, 2) == 'l:' and covered > keep then
      redis.call('HSET', key, name, epoch .. ':' .. keep) -- a lease: when it ends, and how far it reaches
    elseif is_column(name) then
      redis.call('HSET', key, name, value:sub(1, keep * width_of(name, value, node)))
    end
  end
  redis.call('HSET', key, 'r', slice(node.r, 0, keep))
  disown(hex(node.r, keep - 1))
  redis.call('HDEL', key, 'm') -- of a prompt that ended behind the cut
  spend(5 + #flat / 25)
  local holders_left, extra_left, warm_left, cold_left = weigh(redis.call('HGETALL', key))
  account(0, -cut, holders_left - holders, extra_left - extra, warm_left - warm, cold_left - cold)
  tell('trimmed', head, 'size', keep)
  return cut
end
