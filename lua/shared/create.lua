-- Looks at the keys that `create` is going to write: one that is no hash must show before anything is written.
local function check(chain, first, max_run)
  redis.call('ZCARD', base .. 'leaves')
  redis.call('XLEN', base .. 'log')
  redis.call('HLEN', junction_key(hex(chain:sub(-16))))
  for head = first, #chain / 16 - 1, max_run do
    redis.call('HLEN', node_key(hex(slice(chain, head, head + 1))))
    redis.call('HLEN', junction_key(head > 0 and hex(slice(chain, head - 1, head)) or ''))
  end
end

-- A leaf takes in the chain up to chunk `stop`.
local function grow(node, chain, stop)
  node.matched, node.size = stop - node.first, stop - node.first
  redis.call('HSET', node_key(node.head), 'r', slice(chain, node.first, stop))
  disown(hex(slice(chain, stop - 1, stop)))
  return stop
end

-- Makes nodes for the chain from chunk `first` on, below the node `owner` (nil above the first root). Returns the last
-- node's head, a leaf now, and how many were made.
local function create(chain, first, depth, owner, max_run, fields, blocks)
  local last_depth, last_size
  local total, nodes, parent = #chain / 16, 0, first > 0 and hex(slice(chain, first - 1, first)) or ''
  while first < total do
    local stop, head = math.min(first + max_run, total), hex(slice(chain, first, first + 1))
    discard(head)
    redis.call('HSET', node_key(head), 'p', parent, 'd', depth + first, 'r', slice(chain, first, stop), 'a', fields.now,
      'n', 0, 'c', fields.now, 'h:' .. fields.holder, fields.epoch .. ':' .. stop - first)
    account(0, 0, 1, #blocks > 0 and (stop - first) * 4 or 0)
    if blocks ~= '' then
      redis.call('HSET', node_key(head), 'b:' .. fields.holder, blocks:sub(first * 4 + 1, stop * 4))
    end
    redis.call('HSET', junction_key(parent), head, '', unpack(owner and { 'o', owner } or {}))
    disown(hex(slice(chain, stop - 1, stop)))
    last_depth, last_size = depth + first, stop - first
    owner, parent, first, nodes = head, hex(slice(chain, stop - 1, stop)), stop, nodes + 1
  end
  redis.call('ZADD', base .. 'leaves', score(fields.now, 0, last_depth, last_size), owner)
  return owner, nodes
end
