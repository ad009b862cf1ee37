-- Removes orphans whose junctions have names that are to be given, where there are many of them: some tens in a call.
-- `new`: as `plan` returns it; `ends`: last chunk of what becomes an inner node, or nil. Returns an error that has the
-- caller call again, or nil when `disown` can remove what is left.
local function clear_orphans(new, ends)
  local junctions, most = { ends }, 50
  for _, node in ipairs(new) do
    junctions[#junctions + 1] = node[2]
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

-- What keeps a chain from being published now, where names that it gives are there already; nil for nothing.
local function hindrance_of(new, lower, ends, node)
  if new.repeats or is_above(new, lower, ends, node) then
    return redis.error_reply('DPDAMAGED the chain has a chunk twice: chained hashes do not repeat')
  end
  return clear_orphans(new, ends)
end
