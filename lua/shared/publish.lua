-- Puts a chain into the tree that begins at this depth. `with`: now, max_run, and of the holder: holder, epoch, and
-- what it keeps for each chunk: column, width in bytes, ids. Publishes as many leading chunks as the call's budget
-- allows, up to the end of a node. Returns what was made: nodes, chunks, the chunks that were there or that a leaf took
-- in, the chunks that nodes begin with, the chunks taken; or nil and an error, and then nothing was published.
local function publish(chain, depth, metadata, with)
  local asked, holder, epoch, max_run = #chain / 16, with.holder, with.epoch, with.max_run
  spend(2)
  -- First only look, at every key that is going to change: what is wrong must show before anything is written.
  local path, pos, stopped = read_path(chain, holder, epoch, with.column, function(fields, count)
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
  local is_leaf, stop = redis.call('HLEN', junction_key(last and hex(last.run) or '')) == 0, pos
  local total = #chain / 16
  local splits = last and last.matched < last.size and (total > pos or metadata ~= '')
  local taken, lower, ends = 0, splits and hex(last.run, last.matched) or nil, nil
  if lower then
    taken = redis.call('HLEN', node_key(lower))
  elseif last and is_leaf and last.size < max_run and not redis.call('HGET', node_key(last.head), 'm') then
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
  local new = plan(chain, stop, max_run)
  spend(3 * #new)
  local hindrance = (new.repeats or new.taken or taken > 0) and hindrance_of(new, lower, ends, last)
  if hindrance then
    return nil, hindrance
  end

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
  local word = total < asked and 'part ' .. total .. ' ' or 'heads ' -- as ingest tells it
  return { nodes = nodes, chunks = chunks, there = pos, starts = starts, taken = total, word = word }
end
