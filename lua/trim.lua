#!lua flags=allow-oom
-- trim: a holder no longer has a chain's last chunk: its coverage ends before it, there and on all branches behind.
-- Coverage stays closed under prefix: who covers a node covers all that lies above it. What nobody covers goes.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    holder
-- ARGV[3]    epoch of the holder
-- ARGV[4]    the chain up to the lost chunk, 16 bytes a chunk, at most 4,096 and one run; begins at a node's head
-- ARGV[5]    what the call before returned to resume with, "" in the first
-- ARGV[6]    units of work to do in this call
-- returns    {chunks of coverage taken away, nodes removed, chunks removed, "" when done, else what to resume with}
-- errors     DPGONE, DPSCHEMA, DPSTALE, DPDAMAGED
-- flags      allow-oom: it only makes room
-- cost       an HMGET a node on the path; an HMGET and its change for each node that loses coverage, and a read for
--            each of its siblings, where the junction counts any that is covered. The next call resumes
-- @include guard
-- @include writes
-- @include budget
-- @include keys
-- @include tally
-- @include covered
-- @include walk
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
-- @include climb
-- @include descend
-- @include withdraw
allow(tonumber(ARGV[6]))
local taken, nodes, chunks, _, resume = withdraw(ARGV[4], ARGV[2], tonumber(ARGV[3]), ARGV[5])
if not taken then
  return nodes
end
settle()
return answer({ taken, nodes, chunks, resume })
