-- How many chunks and bytes must go from a shard that held these chunks, bytes and cold bytes when the call began; none
-- when every bound holds.
local function excess(held, most_chunks, most_bytes, most_leaves, most_cold)
  if count_of(held[3]) + added.cold > most_cold then
    return math.huge, math.huge -- what has been idle longest goes first, and that is what lies cold
  elseif most_leaves < math.huge and redis.call('ZCARD', base .. 'leaves') > most_leaves then
    return math.huge, math.huge
  end
  local chunks, bytes = count_of(held[1]) + added.chunks - most_chunks, count_of(held[2]) + added.bytes - most_bytes
  return math.max(chunks, 0), math.max(bytes, 0)
end

-- How many chunks a leaf has to give up, from its end on, so that so many chunks and bytes go; or all that it has.
local function surplus(size, sizes, chunks, bytes)
  local cut = 0
  while cut < size and (chunks > 0 or bytes > 0) do
    cut = cut + 1
    chunks, bytes = chunks - 1, bytes - 16 - size_at(sizes, size - cut)
  end
  return cut
end

-- How many chunks of a leaf this call may remove, from its end on: as many as the budget pays for, at least one. A
-- payload costs by its parts, each of which is looked for and removed.
local function affordable(size, node)
  local warm, cold, cut = node['b:@warm'] or '', node['b:@cold'] or '', 0
  spend(6)
  while cut < size and not (is_spent() and cut > 0) do
    cut = cut + 1
    local parts = (size_at(warm, size - cut) + size_at(cold, size - cut)) / part
    spend(parts / 3 + (#warm + #cold > 0 and 0.05 or 0))
  end
  return cut
end

-- Whether a node has children, whoever names it as a leaf.
local function has_children(head, run)
  local is_inner = redis.pcall('HGET', junction_key(hex(run)), 'o') == head
  damaged = damaged + (is_inner and 1 or 0)
  return is_inner
end
