#!lua flags=allow-oom
-- drop: take out a whole subtree, leaves before their parents, at most so many nodes a call: call again until done.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the subtree's head in hex, or "root" for all there is
-- ARGV[3]    the most nodes to remove in this call
-- returns    {nodes removed, chunks removed, 1 when nothing is left of it, else 0}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       one HGET, one HKEYS and one removal a node; every junction on the way down is read once
-- @include guard
-- @include writes
-- @include keys
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
local top, budget = ARGV[2], tonumber(ARGV[3])
redis.call('ZCARD', base .. 'leaves')
redis.call('XLEN', base .. 'log')

local stack, opened, nodes, chunks = { top }, {}, 0, 0
while #stack > 0 and nodes < budget do
  local head = stack[#stack]
  local run = head ~= 'root' and redis.call('HGET', node_key(head), 'r')
  if not opened[head] and (run or head == 'root') then
    opened[head] = true
    local depth = #stack
    for _, child in ipairs(redis.call('HKEYS', junction_key(run and hex(run) or ''))) do
      if #stack - depth >= budget - nodes then
        break -- enough for this call: it ends before it comes back here
      elseif child ~= 'o' then
        stack[#stack + 1] = child
      end
    end
  else
    stack[#stack] = nil
    if run then
      nodes, chunks = nodes + 1, chunks + unlink(head, fields_of(head))
    end
  end
end
settle()
return answer({ nodes, chunks, #stack == 0 and 1 or 0 })
