-- The payloads of a run's chunks from `from` on are removed. Cold ones on another server are named in `trash`: a
-- process that reaches it has to delete them.
local function release(tier, run, sizes, from)
  local keys, elsewhere = {}, tier == '@cold' and #sizes > 0 and redis.call('HGET', KEYS[1], 'elsewhere') == '1'
  for at = from, math.min(#sizes / 4, #run / 16, 4352) - 1 do
    local chunk, size = hex(run, at), size_at(sizes, at)
    if size > part and not elsewhere then
      for _, key in ipairs((values_of(tier, chunk))) do
        keys[#keys + 1] = key
      end
    elseif size > 0 then
      keys[#keys + 1] = elsewhere and chunk or base .. tiers[tier] .. chunk
    end
  end
  for i = 1, #keys, 1000 do
    local last = math.min(i + 999, #keys)
    if elsewhere then
      if type(redis.pcall('SADD', base .. 'trash', unpack(keys, i, last))) ~= 'number' then
        redis.call('UNLINK', base .. 'trash') -- no set: it holds nothing that is of use
        redis.call('SADD', base .. 'trash', unpack(keys, i, last))
      end
      redis.pcall('SREM', base .. 'kept', unpack(keys, i, last))
    else
      redis.call('UNLINK', unpack(keys, i, last))
    end
  end
end

-- All payloads of a node from chunk `from` on are removed.
local function release_all(node, from)
  for tier in pairs(tiers) do
    release(tier, node.r or '', node['b:' .. tier] or '', from)
  end
end
