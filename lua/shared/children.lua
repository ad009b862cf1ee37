-- Some children of the node whose last chunk is `parent` ("root" for the roots): those that any of the holders covers,
-- or all where `holders` is nil. `cursor`: "0" to begin; `owner`: head of that node, "" where it was looked at before.
-- Returns their heads and the cursor to go on with, "0" at the end. A junction that counts none for these holders is
-- not read. A child names its parent and the junction its owner: each node has one parent, and no way down is a circle.
local function children_of(parent, cursor, holders, owner)
  local last, found, fields = parent == 'root' and '' or parent, {}, { 'p' }
  for first = 1, holders and #holders or 0, 500 do
    local counts = redis.pcall('HMGET', counts_key(last), unpack(holders, first, math.min(first + 499, #holders)))
    for i, count in ipairs(counts) do
      if count then
        fields[#fields + 1] = 'h:' .. holders[first + i - 1]
      end
    end
  end
  spend(0.5)
  if holders and #fields == 1 then
    return found, '0'
  end
  local is_owned = last == '' or owner == '' or redis.pcall('HGET', junction_key(last), 'o') == owner
  local reply = is_owned and redis.pcall('HSCAN', junction_key(last), cursor, 'COUNT', 64) or {}
  if not reply[2] then
    damaged = damaged + ((reply.err or redis.call('EXISTS', junction_key(last)) == 1) and 1 or 0)
    return found, '0'
  end
  for i = 1, #reply[2], 2 do
    local child = reply[2][i]
    local values = is_child(child) and redis.pcall('HMGET', node_key(child), unpack(fields)) or {}
    local is_wanted = values[1] == last and not holders
    for at = 2, values[1] == last and #fields or 0 do
      is_wanted = is_wanted or values[at]
    end
    if values.err or (values[1] and values[1] ~= last) then
      damaged = damaged + 1
    end
    if is_wanted then
      found[#found + 1] = child
    end
  end
  spend(1 + #reply[2] / 5)
  return found, reply[1]
end
