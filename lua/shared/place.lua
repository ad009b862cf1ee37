-- Whether the tree allows payloads of a node to lie in a tier: what is warm has only warm ones above it, so that what
-- lies cold lies at the ends.
local function may_move(head, to)
  if to == '@warm' then
    local parent = redis.call('HGET', node_key(head), 'p') or ''
    local owner = parent ~= '' and redis.call('HGET', junction_key(parent), 'o')
    local run, held = unpack(owner and redis.call('HMGET', node_key(owner), 'r', 'h:@warm') or {})
    return parent == '' or (run and held == '1:' .. #run / 16)
  end
  return covered_children(hex(redis.call('HGET', node_key(head), 'r')), '@warm') == 0
end

-- The sizes of a node's payloads in a tier, once these copies are there as well.
local function joined(there, copies)
  local none, sizes = '\0\0\0\0', {}
  for at = 0, math.max(#there, #copies) / 4 - 1 do
    local copy = copies:sub(at * 4 + 1, at * 4 + 4)
    sizes[at + 1] = (#copy == 4 and copy ~= none) and copy or there:sub(at * 4 + 1, at * 4 + 4)
  end
  return table.concat(sizes)
end

-- The node's payloads are in the tier `to` now, with the sizes `after`, and no longer in `from`, but for the `rest`
-- behind those that were moved.
local function place(head, run, from, to, moved, rest, there, after)
  local key, stays = node_key(head), rest ~= ''
  local parent, held = unpack(redis.call('HMGET', key, 'p', 'h:' .. to))
  if not held then
    tally(parent or '', to, 1)
  end
  redis.call('HSET', key, 'h:' .. to, '1:' .. #after / 4, 'b:' .. to, after)
  if stays then
    redis.call('HSET', key, 'b:' .. from, ('\0'):rep(#moved) .. rest)
  else
    redis.call('HDEL', key, 'h:' .. from, 'b:' .. from)
    tally(parent or '', from, -1)
  end
  release(from, run, moved, 0)
  local warm, cold = sum_of(after) - sum_of(there), -sum_of(moved)
  if from == '@warm' then
    warm, cold = cold, warm
  end
  account(0, 0, (there == '' and 1 or 0) - (stays and 0 or 1), #after - #there - (stays and 0 or #moved), warm, cold)
  tell('changed', head)
end
