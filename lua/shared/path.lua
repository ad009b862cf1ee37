-- The nodes on a chain's path as a change needs them, without changing any. Returns the path and the chunks matched,
-- or nil and an error: a damaged node, or a holder that a newer process has taken over. `begin`: depth of the chain's
-- first chunk, and so of each node: what is stored may be damaged. `column`: what the holder
-- keeps for each chunk, "b:" block ids or "e:" an engine's keys. `is_over`: asked after each node, with the number of
-- its fields and of the nodes so far, whether another call takes the rest of the path: then true is the third value.
local function read_path(chain, begin, holder, epoch, column, is_over)
  local path, seen, first, total = {}, {}, 0, #chain / 16
  while first < total do
    local head = hex(chain, first)
    if seen[head] then
      return nil, redis.error_reply('DPDAMAGED the chain has chunk ' .. head .. ' twice')
    end
    seen[head] = true
    local run, accessed, held, ids, hits, depth, parent =
      unpack(redis.call('HMGET', node_key(head), 'r', 'a', 'h:' .. holder, column .. holder, 'n', 'd', 'p'))
    if not run then
      break
    end
    local matched = #run % 16 == 0 and match(run, chain, first) or 0
    if matched == 0 then
      return nil, redis.error_reply('DPDAMAGED the run of node ' .. head .. ' does not begin with its head')
    end
    local held_epoch, covered = (held or '0:0'):match('^(%d+):(%d+)$')
    held_epoch, covered = count_of(held_epoch), math.min(count_of(covered), #run / 16)
    if held_epoch > epoch then
      return nil, redis.error_reply('DPSTALE ' .. holder .. ' has been taken over: its epoch is ' .. held_epoch)
    end
    path[#path + 1] = {
      head = head, first = first, run = run, size = #run / 16, matched = matched, ids = ids or '',
      accessed = accessed, hits = hits, depth = begin + first,
      epoch = held_epoch, covered = covered, held = held,
      parent = parent or '',
    }
    damaged = damaged + (tonumber(depth) == begin + first and 0 or 1)
    first = first + matched
    if matched * 16 < #run then
      break
    elseif is_over and first < total and is_over(redis.call('HLEN', node_key(head)), #path) then
      return path, first, true
    end
  end
  return path, first
end

-- Whether the holder covers the whole parent of a node, and so all that lies above it.
local function covers_parent(head, holder, epoch)
  local owner = redis.call('HGET', junction_key(redis.call('HGET', node_key(head), 'p') or ''), 'o')
  local run, held = unpack(owner and redis.call('HMGET', node_key(owner), 'r', 'h:' .. holder) or {})
  return run and held == epoch .. ':' .. #run / 16
end
