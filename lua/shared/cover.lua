-- The holder has the first k chunks of the node. Within an epoch coverage only grows here; trim is what shrinks it.
local function cover(node, with, k)
  local field, width = with.column .. with.holder, with.width
  local ids = with.ids:sub(node.first * width + 1, (node.first + k) * width)
  if node.epoch == with.epoch then
    ids, k = ids .. node.ids:sub(#ids + 1), math.max(k, node.covered)
  end
  account(0, 0, node.held and 0 or 1, #ids - #node.ids, field == 'b:@warm' and sum_of(ids) - sum_of(node.ids) or 0)
  if not node.held then
    tally(node.parent, with.holder, 1)
  end
  local key, changed = node_key(node.head), {}
  if node.epoch ~= with.epoch or k > node.covered then
    changed[1], changed[2] = 'h:' .. with.holder, with.epoch .. ':' .. k
  end
  if ids ~= '' and ids ~= node.ids then
    changed[#changed + 1] = field
    changed[#changed + 1] = ids
  elseif ids == '' and node.ids ~= '' then
    redis.call('HDEL', key, field)
  end
  if #changed > 0 then
    redis.call('HSET', key, unpack(changed))
  end
end
