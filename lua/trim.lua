#!lua flags=allow-oom
-- trim: a holder no longer has a chain's last chunk: its coverage ends before it, there and on all branches behind.
-- Coverage stays closed under prefix: who covers a node covers all that lies above it. What nobody covers goes.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    holder
-- ARGV[3]    epoch of the holder
-- ARGV[4]    the chain up to the lost chunk, 16 bytes a chunk, at most 4,096 and one run; begins at a node's head
-- ARGV[5]    the most nodes to change in this call, deepest first
-- returns    {chunks of coverage taken away, nodes removed, chunks removed, 1 when done, 0 to be called again}
-- errors     DPGONE, DPSCHEMA, DPSTALE, DPDAMAGED
-- flags      allow-oom: it only makes room
-- cost       one HMGET a node on the path; an HMGET, HKEYS and HGETALL for each node that loses coverage
-- @include guard
-- @include writes
-- @include keys
-- @include walk
-- @include path
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
-- @include uncover
-- @include withdraw
local taken, nodes, chunks, done = withdraw(ARGV[4], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5]))
if not taken then
  return nodes
end
settle()
return answer({ taken, nodes, chunks, done == 'again' and 0 or 1 })
