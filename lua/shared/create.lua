-- The nodes that a chain makes from chunk `first` on, looked at before anything is written: a key that is no hash must
-- show. Names that are given in the same call: `lower`, head of the lower half of a split; `ends`, last chunk of the
-- upper half or of a leaf that grows; `tip`: last chunk of the node that the path ends in, as it is now. Returns
-- {{head, last chunk}, ..., taken = whether any of these names is there already, repeats = whether any comes up twice}.
local function plan(chain, first, max_run, lower, ends, tip)
  local new, keys, seen, taken = { repeats = ends == tip }, {}, {}, 0
  for at = first, #chain / 16 - 1, max_run do
    local node = { hex(chain, at), hex(chain, math.min(at + max_run, #chain / 16) - 1) }
    local key, junction = node_key(node[1]), junction_key(node[2])
    new.repeats = new.repeats or seen[key] or seen[junction] or node[1] == lower or node[2] == ends or node[2] == tip
    seen[key], seen[junction] = true, true
    new[#new + 1], keys[#keys + 1], keys[#keys + 2] = node, key, junction
  end
  for i = 1, #keys, 1000 do -- one call for what mostly is not there; as many as unpack can take
    taken = taken + redis.call('EXISTS', unpack(keys, i, math.min(i + 999, #keys)))
  end
  for i = 1, taken > 0 and #keys or 0 do
    redis.call('HLEN', keys[i])
  end
  new.taken = taken > 0
  return new
end

-- A leaf takes in the chain up to chunk `stop`.
local function grow(node, chain, stop)
  node.matched, node.size = stop - node.first, stop - node.first
  redis.call('HSET', node_key(node.head), 'r', slice(chain, node.first, stop))
  disown(hex(chain, stop - 1))
  return stop
end

-- Makes the planned nodes for the chain from chunk `first` on, below the node `owner` (nil above the first root).
-- `fresh`: `owner` is a leaf. Returns the last node's head, a leaf now.
local function create(chain, first, depth, owner, with, new, fresh)
  local total, parent, size, ids, width =
    #chain / 16, first > 0 and hex(chain, first - 1) or '', 0, with.ids, with.width
  local warm = with.holder == '@warm' and sum_of(ids, first) or 0
  account(0, 0, #new, #ids > 0 and (total - first) * width or 0, warm)
  if owner then
    redis.call('ZREM', base .. 'leaves', owner)
  end
  for _, node in ipairs(new) do
    local head, last = node[1], node[2]
    first = first + size
    size = math.min(with.max_run, total - first)
    if new.taken then
      discard(head)
      disown(last)
    end
    redis.call('HSET', node_key(head), 'p', parent, 'd', depth + first, 'r', slice(chain, first, first + size),
      'a', with.now, 'n', '0', 'c', with.now, 'h:' .. with.holder, with.epoch .. ':' .. size,
      unpack(ids == '' and {} or { with.column .. with.holder, ids:sub(first * width + 1, (first + size) * width) }))
    if fresh then
      redis.call('HSET', junction_key(parent), 'o', owner, head, '', with.holder, 1)
    else
      redis.call('HSET', junction_key(parent), head, '', unpack(owner and { 'o', owner } or {}))
      tally(parent, with.holder, 1)
    end
    owner, parent, fresh = head, last, true
  end
  redis.call('ZADD', base .. 'leaves', score(with.now, 0, depth + first, size), owner)
  return owner
end
