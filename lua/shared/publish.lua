-- Puts a chain into the tree that begins at this depth. `with`: now, max_run, and of the holder: holder, epoch, and
-- what it keeps for each chunk: column, width in bytes, ids. Returns what was made: nodes, chunks, the chunks that were
-- there or that a leaf took in, the chunks that nodes begin with; or nil and an error, and then nothing has changed.
local function publish(chain, depth, metadata, with)
  local total, holder, epoch, max_run = #chain / 16, with.holder, with.epoch, with.max_run
  -- First only look, at every key that is going to change: what is wrong must show before anything is written.
  local path, pos = read_path(chain, holder, epoch, with.column)
  if not path then
    return nil, pos
  elseif depth > 0 and not (pos > 0 and covers_parent(path[1].head, holder, epoch)) then
    return nil, redis.error_reply('DPNOPARENT the chain goes on from a node that is gone: publish it from the root')
  end
  local last = path[#path]
  local is_leaf, stop = redis.call('HLEN', junction_key(last and hex(last.run) or '')) == 0, pos
  local splits = last and last.matched < last.size and (total > pos or metadata ~= '')
  if splits then
    redis.call('HLEN', node_key(hex(last.run, last.matched)))
  elseif last and is_leaf and last.size < max_run and not redis.call('HGET', node_key(last.head), 'm') then
    stop = math.min(total, last.first + max_run)
  end
  redis.call('ZCARD', base .. 'leaves')
  redis.call('XLEN', base .. 'log')
  if splits or stop > pos then
    redis.call('HLEN', junction_key(hex(chain, stop - 1)))
  end
  local new = plan(chain, stop, max_run)

  -- Then write.
  local nodes, chunks, starts = #new + (splits and 1 or 0), total - pos, {}
  account(nodes, chunks, 0, 0)
  if splits then
    split(last, last.matched, is_leaf, with.width)
  elseif stop > pos then
    pos = grow(last, chain, stop)
  end
  for i, node in ipairs(path) do
    cover(node, with, node.matched)
    starts[i] = node.first
  end
  local tail = last and last.head
  if pos < total then
    for i = 1, #new do
      starts[#starts + 1] = pos + (i - 1) * max_run
    end
    tail = create(chain, pos, depth, tail, with, new, last and is_leaf and not splits)
  else
    local accessed = ('%.0f'):format(math.max(tonumber(with.now), tonumber(last.accessed)))
    redis.call('HSET', node_key(tail), 'a', accessed)
    rank(tail, accessed, last.hits, last.depth, last.size)
  end
  if metadata ~= '' then
    account(0, 0, 0, #metadata - #(redis.call('HGET', node_key(tail), 'm') or ''))
    redis.call('HSET', node_key(tail), 'm', metadata)
  end
  return { nodes = nodes, chunks = chunks, there = pos, starts = starts }
end
