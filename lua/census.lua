#!lua flags=no-writes
-- census: who covers some nodes, and which nodes lie right behind them; of one member all that is needed to go on.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    member whose chunks and keys are wanted as well, or "": then chunks and keys are ""
-- ARGV[3..]  heads of nodes, in hex; "root" for what lies above all
-- returns    {parent, depth, {head of a child, ...}, holder, "epoch:k", chunks, keys, holder, ...} for each there is
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HGETALL and an HKEYS a node
-- @include guard
-- @include reads
-- @include keys
local wanted, reply = ARGV[2], {}

-- What lies behind the node whose last chunk this is.
local function children_of(last)
  local children = {}
  for _, head in ipairs(redis.call('HKEYS', junction_key(last))) do
    if head ~= 'o' then
      children[#children + 1] = head
    end
  end
  return children
end

local function tell_of(head)
  local flat, named = redis.call('HGETALL', node_key(head)), {}
  for i = 1, #flat, 2 do
    named[flat[i]] = flat[i + 1]
  end
  if not named.r then
    return nil
  end
  local told = { named.p or '', named.d or '0', children_of(hex(named.r)) }
  for name, value in pairs(named) do
    local holder = name:match('^h:(.*)$')
    if holder and (wanted == '' or holder:match('^[^@]*') == wanted) then
      local n, k = #told, tonumber(value:match('%d+$')) or 0
      told[n + 1], told[n + 2], told[n + 3], told[n + 4] = holder, value, '', ''
      if wanted ~= '' then
        told[n + 3], told[n + 4] = slice(named.r, 0, k), named['e:' .. holder] or ''
      end
    end
  end
  return told
end

for i = 3, #ARGV do
  reply[#reply + 1] = ARGV[i] == 'root' and { '', '0', children_of('') } or tell_of(ARGV[i])
end
return answer(reply)
