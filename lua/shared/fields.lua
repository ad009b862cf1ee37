-- A node's fields as they come and by name, for what follows: a run of 4 KB is not to be read twice.
local function fields_of(head)
  local flat, named = redis.pcall('HGETALL', node_key(head)), {}
  for i = 1, #flat, 2 do
    named[flat[i]] = flat[i + 1]
  end
  return flat, named
end

-- Whether a field has something for every chunk that a holder covers: "b:<holder>" block ids, of leading chunks at
-- least; "e:<holder>" an engine's keys of blocks, of all of them.
local function is_column(name)
  local kind = name:sub(1, 2)
  return kind == 'b:' or kind == 'e:'
end

-- Bytes a chunk in such a field of a node with these fields by name.
local function width_of(name, value, named)
  if name:sub(1, 2) == 'b:' then
    return 4
  end
  local covered = count_of((named['h:' .. name:sub(3)] or ''):match('%d+$'))
  return covered > 0 and #value / covered or 0
end

-- Epoch, as text, and chunks of a holder's "epoch:k"; 0 chunks of what is none.
local function coverage_of(value)
  local epoch, covered = (value or ''):match('^(%d+):(%d+)$')
  return epoch or '0', count_of(covered)
end
