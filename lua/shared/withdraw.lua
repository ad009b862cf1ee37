-- Whether coverage of the holder may lie in a node or behind it: what is cold lies behind what is warm.
local function holds(head, holder)
  local held, warm, cold = unpack(redis.call('HMGET', node_key(head), 'h:' .. holder, 'h:@warm', 'h:@cold'))
  return held or (tiers[holder] and (warm or cold))
end

-- A holder no longer has a chain's last chunk: its coverage ends before it, there and on all branches behind, at most
-- `budget` nodes now, deepest first. Returns chunks of coverage taken away, nodes and chunks removed, and "done",
-- "again" when there is more to do, "absent" when the tree does not say that the holder has it; or nil and an error.
local function withdraw(chain, holder, epoch, budget)
  local path, matched = read_path(chain, holder, epoch, 'b:')
  if not path then
    return nil, matched
  end
  redis.call('ZCARD', base .. 'leaves')
  redis.call('XLEN', base .. 'log')
  local last = path[#path]
  if not last or matched * 16 < #chain or not (last.held or tiers[holder]) then
    return 0, 0, 0, 'absent'
  end
  local stack, opened, changed, taken, nodes, chunks = { last.head }, {}, 0, 0, 0, 0
  while #stack > 0 and changed < budget do
    local head = stack[#stack]
    local run = redis.call('HGET', node_key(head), 'r') or ''
    if not opened[head] then
      opened[head] = true
      local depth = #stack
      for _, child in ipairs(redis.call('HKEYS', junction_key(hex(run)))) do
        if not tiers[holder] and #stack - depth >= budget - changed then
          break -- enough for this call: it ends before it comes back here
        elseif child ~= 'o' and holds(child, holder) then
          stack[#stack + 1] = child
        end
      end
    else
      stack[#stack] = nil
      local lost, gone, cut = uncover(head, run, holder, head == last.head and last.matched - 1 or 0)
      changed = changed + ((lost > 0 or not tiers[holder]) and 1 or 0)
      taken, nodes, chunks = taken + lost, nodes + gone, chunks + cut
    end
  end
  return taken, nodes, chunks, #stack == 0 and 'done' or 'again'
end
