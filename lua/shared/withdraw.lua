-- The node that a chain ends in, from its chunk `first` on, which a node begins with. Returns the node, or nil and the
-- chunk reached: the end where the chain is not there, less where the budget is spent; or nil, nil and an error.
local function find_end(chain, holder, epoch, first)
  while first * 16 < #chain do
    local head = hex(chain, first)
    local run, held = unpack(redis.call('HMGET', node_key(head), 'r', 'h:' .. holder))
    if not run then
      return nil, #chain / 16
    end
    local matched, held_epoch = #run % 16 == 0 and match(run, chain, first) or 0, count_of((held or '0'):match('^%d+'))
    if matched == 0 then
      return nil, nil, redis.error_reply('DPDAMAGED the run of node ' .. head .. ' does not begin with its head')
    elseif held_epoch > epoch then
      return nil, nil, redis.error_reply('DPSTALE ' .. holder .. ' has been taken over: its epoch is ' .. held_epoch)
    elseif (first + matched) * 16 == #chain then
      return { head = head, first = first, matched = matched, held = held }
    elseif matched * 16 < #run then
      return nil, #chain / 16
    end
    first = first + matched
    spend(0.8)
    if is_spent() then
      return nil, first
    end
  end
  return nil, first
end

-- A holder no longer has a chain's last chunk: its coverage ends before it, there and on all branches below, deepest
-- first, as far as the budget allows. What a shared tier loses it loses both warm and cold: what is cold follows what
-- is warm. `resume`: what the last call returned, "" to begin: "<chunk> <head> ...", the chunk that the node begins
-- with that the chain ends in, or up to which it was followed, and the state of `descend`. Returns chunks of coverage
-- taken away, nodes and chunks removed, "done", "again" or "absent" when the tree does not say that the holder has the
-- chunk, and what to resume with; or nil and an error.
local function withdraw(chain, holder, epoch, resume)
  local holders, taken, nodes, chunks = tiers[holder] and { '@cold', '@warm' } or { holder }, 0, 0, 0
  local fields = { 'h:' .. holders[1], holders[2] and 'h:' .. holders[2] }
  local begin, rest = resume:match('^(%d+) ?(.*)$')
  begin = math.min(tonumber(begin or 0), #chain / 16 - 1)
  redis.call('ZCARD', base .. 'leaves')
  redis.call('XLEN', base .. 'log')
  local last, reached, problem = find_end(chain, holder, epoch, begin)
  if problem then
    return nil, problem
  elseif not last and reached * 16 < #chain then
    return 0, 0, 0, 'again', ('%d '):format(reached)
  elseif not last or not (last.held or tiers[holder]) then
    return 0, 0, 0, 'absent', ''
  end

  local function sum(count, of)
    local total = 0
    for _, each in ipairs(holders) do
      total = total + count(of, each)
    end
    return total
  end
  local state = descend(last.head, rest or '', {
    wanted = function(parent) return sum(covered_children, parent) end,
    wants = function(child, parent)
      local above, one, other = unpack(redis.pcall('HMGET', node_key(child), 'p', unpack(fields)))
      damaged = damaged + (above and above ~= parent and 1 or 0)
      return above == parent and (one or other)
    end,
    leave = function(head)
      for _, each in ipairs(holders) do
        local lost, gone, cut = uncover(head, each, head == last.head and last.matched - 1 or 0)
        taken, nodes, chunks = taken + lost, nodes + gone, chunks + cut
      end
    end,
  })
  if state == '' then
    return taken, nodes, chunks, 'done', ''
  end
  return taken, nodes, chunks, 'again', ('%d %s'):format(last.first, state)
end
