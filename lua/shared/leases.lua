-- When the last lease of a node ends, in ms; 0 when it has none. Leases that ended are cleared away. A lease is a field
-- l:<name> with the value <end in ms>:<leading chunks of the node that it protects>.
local function leased_until(head, fields)
  local latest = 0
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 'l:' then
      local ends = count_of(fields[i + 1]:match('^%d+'))
      if ends <= now then
        redis.call('HDEL', node_key(head), fields[i])
      end
      latest = math.max(latest, ends)
    end
  end
  return latest
end
