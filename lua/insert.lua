#!lua
-- insert: publish a chain. Splits where it leaves a run, extends a leaf that has room, creates nodes, sets coverage. A
-- call takes as many leading chunks as its budget allows: the next one begins with the last node of those.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the most chunks a run may have
-- ARGV[3]    holder
-- ARGV[4]    epoch of the holder
-- ARGV[5]    depth of the chain's first chunk; above 0 that must be a node's head, and the holder cover the parent
-- ARGV[6]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run
-- ARGV[7]    block ids, 4 bytes a chunk, or ""
-- ARGV[8]    metadata of the chain, msgpack, or "": kept with a node that ends where the chain does
-- returns    {nodes made, chunks made, nodes, chunks, bytes and leaves in the shard, the server's time in ms, chunks
--            taken, then the path as walk reports it, without the new nodes at its end: they are as sent, in runs of
--            ARGV[2]}
-- errors     DPGONE, DPSCHEMA, DPNOPARENT, DPSTALE, DPDAMAGED, DPAGAIN
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       one HMGET, one HGETALL and a few HSET a node that was there, two HSET a new one; at most about 70 nodes; a
--            split moves no child
-- @include guard
-- @include writes
-- @include keys
-- @include budget
-- @include tally
-- @include clock
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
-- @include edit
-- @include cover
-- @include create
-- @include hindrance
-- @include publish
local chain, used = ARGV[6], ('%.0f'):format(now)
local done, problem = publish(chain, tonumber(ARGV[5]), ARGV[8], {
  now = used, max_run = tonumber(ARGV[2]), holder = ARGV[3], epoch = tonumber(ARGV[4]),
  column = 'b:', width = 4, ids = ARGV[7],
})
if not done then
  return problem
end
local nodes, chunks, bytes, leaves = unpack(settle())
return answer(walk(slice(chain, 0, done.there), '', { done.nodes, done.chunks, nodes, chunks, bytes, leaves, used,
  done.taken }))
