-- HSET in portions that unpack can take, however many holders a node has.
local function set(key, values)
  for i = 1, #values, 1000 do
    redis.call('HSET', key, unpack(values, i, math.min(i + 999, #values)))
  end
end

-- Cuts a node at chunk `at`. The upper half keeps the key, the lower half takes over the children by one field.
local function split(node, at, is_leaf, width)
  local key, last, lower_head = node_key(node.head), hex(node.run, at - 1), hex(node.run, at)
  local upper, lower = { 'r', slice(node.run, 0, at) }, { 'p', last, 'r', slice(node.run, at, node.size) }
  local counts, shorter = { 'o', node.head, lower_head, '' }, {}
  local function add(half, name, value)
    half[#half + 1], half[#half + 2] = name, value
  end
  local fields, named = fields_of(node.head)
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'd' then
      add(lower, name, node.depth + at)
    elseif name:sub(1, 2) == 'h:' then
      local epoch, covered = coverage_of(value)
      if covered > at then
        add(upper, name, epoch .. ':' .. at)
        add(lower, name, epoch .. ':' .. math.min(covered, node.size) - at)
        add(counts, name:sub(3), 1)
        account(0, 0, 1, 0)
      elseif not is_leaf and not tiers[name:sub(3)] then
        shorter[#shorter + 1] = name:sub(3)
      end
    elseif is_column(name) then
      local cut = at * width_of(name, value, named)
      if #value > cut then
        add(upper, name, value:sub(1, cut))
        add(lower, name, value:sub(cut + 1))
      end
    elseif name:sub(1, 2) == 'l:' then
      local ends, leased = coverage_of(value)
      if leased > at then
        add(lower, name, ends .. ':' .. math.min(leased, node.size) - at)
        redis.call('HDEL', key, name)
      end
    elseif name ~= 'p' and name ~= 'r' then
      add(lower, name, value)
    end
  end
  -- A newer process may have published less than an older one: what the children still say of that one counts for
  -- nothing, but is only found if every node above it names the holder.
  for _, holder in ipairs(shorter) do
    if redis.call('HGET', junction_key(hex(node.run)), holder) then
      add(lower, 'h:' .. holder, '0:1')
      add(counts, holder, 1)
      account(0, 0, 1, 0)
    end
  end
  discard(lower_head)
  set(node_key(lower_head), lower)
  set(key, upper)
  redis.call('HDEL', key, 'm')
  if is_leaf then
    redis.call('ZREM', base .. 'leaves', node.head) -- where a lease had moved it: the lower half may have none
    redis.call('ZADD', base .. 'leaves', score(node.accessed, node.hits, node.depth + at, node.size - at), lower_head)
  else
    redis.call('HSET', junction_key(hex(node.run)), 'o', lower_head)
  end
  disown(last)
  set(junction_key(last), counts)
  tell('split', node.head, 'lower', lower_head)
  node.run, node.size, node.covered, node.ids = upper[2], at, math.min(node.covered, at), node.ids:sub(1, at * width)
end
