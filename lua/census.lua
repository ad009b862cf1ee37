#!lua flags=no-writes
-- census: who covers the nodes below some of the leaves; of one member everything that has to be known to go on.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    where to go on: "0" to begin
-- ARGV[3]    about how many leaves to look at in this call, with all that lies above them
-- ARGV[4]    member whose chunks and keys are wanted as well, or "": then chunks and keys are ""
-- returns    {where to go on, "0" when all was seen, {head, parent, depth, holder, "epoch:k", chunks, keys, holder,
--             ...}, ... for each node; a node may come again in another call}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       ZSCAN; an HGETALL and an HGET a node
-- @include guard
-- @include keys
local wanted, seen = ARGV[4], {}
local page = redis.call('ZSCAN', base .. 'leaves', ARGV[2], 'COUNT', ARGV[3])
local reply = { page[1] }

local function tell_of(head)
  local flat, named = redis.call('HGETALL', node_key(head)), {}
  for i = 1, #flat, 2 do
    named[flat[i]] = flat[i + 1]
  end
  local told = { head, named.p or '', named.d or '0' }
  for name, value in pairs(named) do
    local holder = name:match('^h:(.*)$')
    if holder and (wanted == '' or holder:match('^[^@]*') == wanted) then
      local n, k = #told, tonumber(value:match('%d+$')) or 0
      told[n + 1], told[n + 2], told[n + 3], told[n + 4] = holder, value, '', ''
      if wanted ~= '' then
        told[n + 3], told[n + 4] = slice(named.r or '', 0, k), named['e:' .. holder] or ''
      end
    end
  end
  return told
end

for i = 1, #page[2], 2 do
  local head = page[2][i]
  while head and not seen[head] do
    seen[head] = true
    local told = tell_of(head)
    reply[#reply + 1] = told
    head = told[2] ~= '' and redis.call('HGET', junction_key(told[2]), 'o')
  end
end
return reply
