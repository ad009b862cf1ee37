-- Removes a node that has lost its parent (a failover can take any key), so that it never counts again.
local function discard(head)
  local fields, node = fields_of(head)
  if #fields > 0 then
    local holders, extra, warm, cold = weigh(fields)
    account(-1, -math.floor(#(node.r or '') / 16), -holders, -extra, -warm, -cold)
    release_all(node, 0)
    redis.call('DEL', node_key(head))
    redis.call('ZREM', base .. 'leaves', head)
    redis.call('ZREM', base .. 'hot', head)
    tell('removed', head)
  end
end

-- Where a run ends anew, children that are there already are orphans. Without them nothing below can be reached. Some
-- tens at most are removed: what else a junction names that should not be there stays until the shard is repaired.
local function disown(last)
  local junction = junction_key(last)
  local reply = redis.pcall('HSCAN', junction, '0', 'COUNT', 50)
  local fields = reply[2] or {}
  for i = 1, math.min(#fields, 200), 2 do
    if is_child(fields[i]) and redis.pcall('HGET', node_key(fields[i]), 'p') == last then
      discard(fields[i])
    end
  end
  if #fields > 0 or reply.err then
    redis.call('UNLINK', junction)
  end
end
