-- Some children of the node whose last chunk is `parent` ("root" for the roots): those that any of the holders covers,
-- or all where `holders` is nil. `cursor`: "0" to begin. Returns their heads and the cursor to go on with, "0" at the
-- end. A junction that counts none for these holders is not read.
local function children_of(parent, cursor, holders)
  local last, found, fields = parent == 'root' and '' or parent, {}, {}
  for first = 1, holders and #holders or 0, 500 do
    local counts = redis.call('HMGET', counts_key(last), unpack(holders, first, math.min(first + 499, #holders)))
    for i, count in ipairs(counts) do
      if count then
        fields[#fields + 1] = 'h:' .. holders[first + i - 1]
      end
    end
  end
  spend(0.5)
  if holders and #fields == 0 then
    return found, '0'
  end
  local reply = redis.call('HSCAN', junction_key(last), cursor, 'COUNT', 64)
  for i = 1, #reply[2], 2 do
    local child = reply[2][i]
    local is_wanted = is_child(child) and not holders
    for _, held in ipairs(is_child(child) and holders and redis.call('HMGET', node_key(child), unpack(fields)) or {}) do
      is_wanted = is_wanted or held
    end
    if is_wanted then
      found[#found + 1] = child
    end
  end
  spend(1 + #reply[2] / (holders and 5 or 25))
  return found, reply[1]
end
