-- What keeps a chain from being published now, where names that it gives are there already: an error, or nil for
-- nothing. `new`: as `plan` returns it; `lower`, `ends`: head of the lower half of a split, last chunk of what becomes
-- an inner node, or nil; `node`: what the new nodes are to hang from, nil for the roots of the tree.
--
-- Chained hashes do not repeat: a chain that has a chunk twice is none. The library looks at every chunk of a chain
-- that a caller gives; here it counts where a name in the tree would be above itself, and a script run in circles.
--
-- Children of a node that was lost are orphans. Where there are many of them, some tens are removed in a call, and the
-- caller calls again; `disown` removes what is left. The parts are inside: a script makes its functions at each call.
local function hindrance_of(new, lower, ends, node)
  -- Whether names that are to be given are names of what precedes them; `node` counts as well.
  local function is_above()
    local names, head = { [lower or ''] = true, ['j' .. (ends or '')] = true }, node and node.head
    for _, each in ipairs(new) do
      names[each[1]], names['j' .. each[2]] = true, true
    end
    names[''], names.j = nil, nil
    for _ = 1, 10000 do
      if not head then
        return false
      end
      local parent = redis.call('HGET', node_key(head), 'p') or ''
      if names[head] or names['j' .. parent] then
        return true
      end
      head = parent ~= '' and redis.call('HGET', junction_key(parent), 'o')
    end
    return true -- no chain is so long: nodes that lie below themselves
  end

  if new.repeats or is_above() then
    return redis.error_reply('DPDAMAGED the chain has a chunk twice: chained hashes do not repeat')
  end
  local junctions, most = { ends }, 50
  for _, each in ipairs(new) do
    junctions[#junctions + 1] = each[2]
  end
  for _, last in ipairs(junctions) do
    local key = junction_key(last)
    if redis.call('HLEN', key) > most then
      local fields = redis.call('HSCAN', key, '0', 'COUNT', most)[2]
      for i = 1, math.min(#fields, 4 * most), 2 do
        if is_child(fields[i]) then
          discard(fields[i])
        end
        redis.call('HDEL', key, fields[i])
      end
      settle()
      return redis.error_reply('DPAGAIN orphans are in the way: some of them are removed now')
    end
  end
end
