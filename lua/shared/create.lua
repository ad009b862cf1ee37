-- Looks at the keys that `create` is going to write: one that is no hash must show before anything is written.
local function check(chain, first, max_run)
  for head = first, #chain / 16 - 1, max_run do
    redis.call('HLEN', node_key(hex(slice(chain, head, head + 1))))
    redis.call('HLEN', junction_key(head > 0 and hex(slice(chain, head - 1, head)) or ''))
  end
end

-- Makes nodes for the chain from chunk `first` on, below the node `owner` (nil above the first root). Returns the last
-- node's head and how many were made. A key that is there already lost its parent once (a failover): it is replaced.
local function create(chain, first, depth, owner, max_run, fields, blocks)
  local total, nodes, parent = #chain / 16, 0, first > 0 and hex(slice(chain, first - 1, first)) or ''
  while first < total do
    local stop, head = math.min(first + max_run, total), hex(slice(chain, first, first + 1))
    local orphan = redis.call('HGET', node_key(head), 'r')
    if orphan then
      redis.call('DEL', node_key(head))
      redis.call('ZREM', base .. 'leaves', head)
      redis.call('HINCRBY', KEYS[1], 'chunks', -math.floor(#orphan / 16))
      nodes = nodes - 1
    end
    redis.call('HSET', node_key(head), 'p', parent, 'd', depth + first, 'r', slice(chain, first, stop), 'a', fields.now,
      'n', 0, 'c', fields.now, 'h:' .. fields.holder, fields.epoch .. ':' .. stop - first)
    if blocks ~= '' then
      redis.call('HSET', node_key(head), 'b:' .. fields.holder, blocks:sub(first * 4 + 1, stop * 4))
    end
    redis.call('HSET', junction_key(parent), head, '', unpack(owner and { 'o', owner } or {}))
    owner, parent, first, nodes = head, hex(slice(chain, stop - 1, stop)), stop, nodes + 1
  end
  return owner, nodes
end
