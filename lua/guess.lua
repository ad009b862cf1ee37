#!lua flags=no-writes
-- guess: what a prompt most likely goes on with: child after child, the one used last, where there are few.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    hash of the last chunk of the node to go on from, in hex
-- ARGV[3]    chunks after which the call ends; it ends with its budget as well
-- returns    {-1, then each node as prewarm tells it}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HLEN and HKEYS a node, an HGET a child, an HGETALL for the one that is taken
-- @include guard
-- @include reads
-- @include keys
-- @include budget
-- @include walk
local last, budget, most_children = ARGV[2], tonumber(ARGV[3]), 64
local reply, chunks = { -1 }, 0

-- The child used last, with its depth and run.
local function likeliest(junction)
  local best, latest = nil, -1
  local children = redis.call('HKEYS', junction)
  spend(1 + #children / 8)
  for _, child in ipairs(children) do
    local accessed = is_child(child) and count_of(redis.pcall('HGET', node_key(child), 'a'), -1) or -1
    if accessed > latest then
      best, latest = child, accessed
    end
  end
  return best, unpack(best and redis.call('HMGET', node_key(best), 'd', 'r', 'p') or {})
end

local expected = nil
while chunks < budget and not is_spent() and redis.call('HLEN', junction_key(last)) <= most_children do
  local head, depth, run, parent = likeliest(junction_key(last))
  if not run then
    break
  elseif parent ~= last or not is_run(head, run) or tonumber(depth) ~= (expected or tonumber(depth or '')) then
    damaged = damaged + 1 -- the way down may be a circle
    break
  end
  expected = count_of(depth) + #run / 16
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3] = last, depth, run
  walk(run, '', reply, spend, is_spent)
  last, chunks = hex(run), chunks + #run / 16
end
return answer(reply)
