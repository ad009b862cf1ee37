-- Chained hashes do not repeat: a chain that has a chunk twice is none. In the tree such a chunk would name a node that
-- lies above it as well, and what makes the new node would take that one out.

-- Whether a chunk from `first` on comes twice in the chain; those before it are in the tree, where none does.
local function comes_twice(chain, first)
  local total, seen = #chain / 16, {}
  if (total - first) * 32 < first then -- few: finding one takes as long as noting thirty
    for at = first, total - 1 do
      local chunk, found = slice(chain, at, at + 1), 0
      repeat
        found = chain:find(chunk, found + 1, true)
      until found % 16 == 1
      if found ~= at * 16 + 1 then
        return true
      end
    end
    return false
  end
  for at = 1, first < total and #chain or 0, 16 do
    local chunk = chain:sub(at, at + 15)
    if seen[chunk] then
      return true
    end
    seen[chunk] = true
  end
  return false
end

-- Whether new names are names of what lies above. `names`: heads, and last chunks behind "j", that are there already.
-- `node`: what the new nodes are to hang from, which counts as well; nil for the roots of the tree.
local function is_above(names, node)
  local head = node and node.head
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

local function refuse_repeat()
  return redis.error_reply('DPDAMAGED the chain has a chunk twice: chained hashes do not repeat')
end
