-- Puts a chain into the tree that begins at this depth. `with`: now, max_run, holder, epoch, and what the holder keeps
-- for each chunk: column, width in bytes, ids. Publishes as many leading chunks as the call's budget allows, up to a
-- node's end. Returns what was made: nodes, chunks, chunks that were there or that a leaf took in, chunks that nodes
-- begin with, chunks taken; or nil and an error, and then nothing was published.
local function publish(chain, depth, metadata, with)
  local asked, holder, epoch, max_run = #chain / 16, with.holder, with.epoch, with.max_run
  spend(2)
  -- First only look, at every key that is going to change: what is wrong must show before anything is written.
  local path, pos, stopped = read_path(chain, depth, holder, epoch, with.column, function(fields, count)
    spend(3 + fields / 12) -- read twice, written once
    return count > 1 and is_spent() -- a call may begin with a node that the one before took
  end)
  if not path then
    return nil, pos
  elseif depth > 0 and not (pos > 0 and covers_parent(path[1].head, holder, epoch)) then
    return nil, redis.error_reply('DPNOPARENT the chain goes on from a node that is gone: publish it from the root')
  end
  local last = path[#path]
  if stopped then
    chain, metadata = slice(chain, 0, pos), ''
  end
  local tip = last and hex(last.run) or ''
  local owner, stop, total = redis.call('HGET', junction_key(tip), 'o'), pos, #chain / 16 -- a leaf has no junction
  local splits = last and last.matched < last.size and (total > pos or metadata ~= '')
  local taken, lower, ends = owner and owner ~= last.head and 1 or 0, splits and hex(last.run, last.matched), nil
  if lower then
    taken = redis.call('HLEN', node_key(lower))
  elseif last and not owner and last.size < max_run and not redis.call('HGET', node_key(last.head), 'm') then
    stop = math.min(total, last.first + max_run)
  end
  redis.call('ZCARD', base .. 'leaves')
  redis.call('XLEN', base .. 'log')
  if splits or stop > pos then
    ends = hex(chain, stop - 1)
    taken = taken + redis.call('HLEN', junction_key(ends))
  end
  local most = math.max(1, math.floor(units_left / 3)) -- new nodes: at least one, so that every call gets on
  if total > stop + most * max_run then
    total, metadata = stop + most * max_run, ''
    chain = slice(chain, 0, total)
  end
  with.ids = with.ids:sub(1, total * with.width)
  local new = plan(chain, stop, max_run, lower, ends, tip)
  spend(3 * #new)
  local is_hindered = new.repeats or new.taken or taken > 0
  local problem = is_hindered and hindrance_of(new, chain, depth, with, last, stop, lower, ends)
  if problem then
    return nil, problem
  end

  -- Then write.
  local nodes, chunks, starts, tail = #new + (splits and 1 or 0), total - pos, {}, last and last.head
  account(nodes, chunks, 0, 0)
  if splits then
    split(last, last.matched, not owner, with.width)
  elseif stop > pos then
    pos = grow(last, chain, stop)
  end
  for i, node in ipairs(path) do
    cover(node, with, node.matched)
    starts[i] = node.first
  end
  for i = 1, #new do
    starts[#starts + 1] = pos + (i - 1) * max_run
  end
  if pos < total then
    tail = create(chain, pos, depth, tail, with, new, last and not owner and not splits)
  else
    local accessed = ('%.0f'):format(math.max(tonumber(with.now), count_of(last.accessed)))
    redis.call('HSET', node_key(tail), 'a', accessed)
    rank(tail, accessed, last.hits, last.depth, last.size)
  end
  if metadata ~= '' then
    account(0, 0, 0, #metadata - #(redis.call('HGET', node_key(tail), 'm') or ''))
    redis.call('HSET', node_key(tail), 'm', metadata)
  end
  return { nodes = nodes, chunks = chunks, there = pos, starts = starts, taken = total,
    word = total < asked and 'part ' .. total .. ' ' or 'heads ' } -- as ingest tells it
end
