#!lua flags=allow-oom
-- trim: a holder no longer has a chain's last chunk: its coverage ends before it, there and on all branches behind.
-- Coverage stays closed under prefix: who covers a node covers all that lies above it. What nobody covers goes.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    holder
-- ARGV[3]    epoch of the holder
-- ARGV[4]    the chain up to the lost chunk, 16 bytes a chunk, at most 4,096 and one run; begins at a node's head
-- ARGV[5]    the most nodes to change in this call, deepest first
-- returns    {chunks of coverage taken away, nodes removed, chunks removed, 1 when done, 0 to be called again}
-- errors     DPGONE, DPSCHEMA, DPSTALE, DPDAMAGED
-- flags      allow-oom: it only makes room
-- cost       one HMGET a node on the path; an HMGET, HKEYS and HGETALL for each node that loses coverage
-- @include guard
-- @include keys
-- @include walk
-- @include path
-- @include policies
-- @include score
-- @include account
-- @include tell
-- @include discard
-- @include unlink
-- @include uncover
local holder, epoch, chain, budget = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])

local path, matched = read_path(chain, holder, epoch)
if not path then
  return matched
end
redis.call('ZCARD', base .. 'leaves')
redis.call('XLEN', base .. 'log')
local last = path[#path]
if not last or matched * 16 < #chain or not last.held then
  return { 0, 0, 0, 1 } -- the tree does not say that the holder has it
end

local stack, opened, changed, taken, nodes, chunks = { last.head }, {}, 0, 0, 0, 0
while #stack > 0 and changed < budget do
  local head = stack[#stack]
  local run = redis.call('HGET', node_key(head), 'r') or ''
  if not opened[head] then
    opened[head] = true
    local depth = #stack
    for _, child in ipairs(redis.call('HKEYS', junction_key(hex(run:sub(-16))))) do
      if #stack - depth >= budget - changed then
        break -- enough for this call: it ends before it comes back here
      elseif child ~= 'o' and redis.call('HGET', node_key(child), 'h:' .. holder) then
        stack[#stack + 1] = child
      end
    end
  else
    stack[#stack] = nil
    local lost, gone, cut = uncover(head, run, holder, head == last.head and last.matched - 1 or 0)
    changed, taken, nodes, chunks = changed + 1, taken + lost, nodes + gone, chunks + cut
  end
end
settle()
return { taken, nodes, chunks, #stack == 0 and 1 or 0 }
