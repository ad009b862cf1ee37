-- Chained hashes do not repeat: a chain that has a chunk twice is none. The library looks at every chunk of a chain
-- that a caller gives; here it counts where a name in the tree would be above itself, and a script run in circles.

-- Whether names that are to be given, and are there already, are names of what precedes them. `new`: as `plan` returns
-- it; `lower`, `ends`: head of the lower half of a split, last chunk of what becomes an inner node, or nil; `node`:
-- what the new nodes are to hang from, which counts as well, nil for the roots of the tree.
local function is_above(new, lower, ends, node)
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
