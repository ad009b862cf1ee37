#!lua flags=no-writes
-- idle: nodes whose warm payloads nobody has used for long, behind which none is warm: what may become cold next.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    how long ago the last use has to be, ms by the server's clock
-- ARGV[3]    rank among the leaves to begin with, in the order of eviction
-- ARGV[4]    how many leaves to look at, with what lies above them
-- ARGV[5]    "", or the head of a node above the leaf of that rank, to go on with upwards
-- returns    {rank to go on with, -1 at the end, head to go on with or "", head, run, sizes of its warm payloads, head,
--            ...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       a ZRANGE, and an HMGET and an HGET a node, at most about 300 nodes
-- @include guard
-- @include reads
-- @include keys
-- @include budget
-- @include tally
-- @include covered
-- @include upwards
-- @include clock
local before, rank, most = now - tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local leaves, seen = redis.call('ZRANGE', base .. 'leaves', rank, rank + most - 1), {}
local reply = { #leaves == most and rank + most or -1, '' }

-- Whether a node's warm payloads may become cold.
local function is_idle(run, sizes, accessed)
  return sizes and #sizes % 4 == 0 and #sizes <= #run / 4 and count_of(accessed) <= before
    and covered_children(hex(run), '@warm') == 0
end

for i, leaf in ipairs(leaves) do
  local below
  local head = i == 1 and ARGV[5] ~= '' and ARGV[5] or leaf
  while head and not seen[head] do
    if is_spent() then
      reply[1], reply[2] = rank + i - 1, head
      return answer(reply)
    end
    spend(0.7)
    seen[head] = true
    local run, held, sizes, accessed, parent, depth = unpack(redis.pcall('HMGET', node_key(head),
      'r', 'h:@warm', 'b:@warm', 'a', 'p', 'd'))
    if not run or not is_sound(head, run, depth, parent, below) then
      break
    elseif held then
      if is_idle(run, sizes, accessed) then
        local n = #reply
        reply[n + 1], reply[n + 2], reply[n + 3] = head, slice(run, 0, #sizes / 4), sizes
      end
      break
    end
    below = count_of(depth)
    head = parent ~= '' and redis.call('HGET', junction_key(parent), 'o')
  end
end
return answer(reply)
