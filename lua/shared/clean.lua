-- Whether a node's fields make sense. One that another hand wrote is passed over: look-ups refuse it as well.
local function is_sound(head, flat, node)
  local sound = is_run(head, node.r)
  for i = 1, #flat, 2 do
    if flat[i]:sub(1, 2) == 'h:' then
      local _, covered = coverage_of(flat[i + 1])
      sound = sound and covered > 0
    end
  end
  return sound
end

-- The last chunk of a node in hex, nil when it is not there or damaged, and those of the holders that cover it under an
-- older epoch than `newest` has.
local function look_at(head, holders, newest)
  local fields, stale = { 'r' }, {}
  for i, holder in ipairs(holders) do
    fields[i + 1] = 'h:' .. holder
  end
  local values = redis.pcall('HMGET', node_key(head), unpack(fields))
  spend(1 + #holders / 50)
  for i, holder in ipairs(holders) do
    if (tonumber((values[i + 1] or ''):match('^%d+') or '') or math.huge) < newest[holder] then
      stale[#stale + 1] = holder
    end
  end
  local run = values[1]
  return is_run(head, run) and hex(run) or nil, stale
end

-- Whether children of the node with this last chunk still have what counts for nothing: it was split meanwhile.
local function is_counted(last, stale)
  for _, holder in ipairs(stale) do
    if covered_children(last, holder) > 0 then
      return true
    end
  end
  return false
end

-- Takes from a node what counts for nothing. A leaf that nobody covers is removed, one that nobody covers to its end is
-- cut. Adds chunks of coverage, nodes and chunks to `total`.
local function clean(head, stale, total)
  local flat, node = fields_of(head)
  spend(2 + #flat / 50)
  if not is_sound(head, flat, node) then
    damaged = damaged + (#flat > 0 and 1 or 0)
    return
  end
  for _, holder in ipairs(stale) do
    total[1] = total[1] + uncover(head, holder, 0, true)
  end
  if redis.pcall('HLEN', junction_key(hex(node.r))) ~= 0 then
    return
  end
  flat, node = fields_of(head)
  local longest = longest_coverage(flat) -- a child that was removed after what covered this node had kept the rest
  if longest == 0 then
    total[2], total[3] = total[2] + 1, total[3] + unlink(head, flat, node)
  elseif longest < #node.r / 16 then
    total[3] = total[3] + shorten(head, longest, flat, node)
  end
end
