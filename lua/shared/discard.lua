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

-- Where a run ends anew, children that are there already are orphans. Without them nothing below can be reached.
local function disown(last)
  for _, child in ipairs(redis.call('HKEYS', junction_key(last))) do
    if is_child(child) then
      discard(child)
    end
  end
  redis.call('DEL', junction_key(last))
end
