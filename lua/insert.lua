#!lua
-- insert: publish a chain. Splits where it leaves a run, extends a leaf that has room, creates nodes, sets coverage.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    now, ms
-- ARGV[3]    the most chunks a run may have
-- ARGV[4]    holder
-- ARGV[5]    epoch of the holder
-- ARGV[6]    depth of the chain's first chunk; above 0 that must be a node's head, and the holder cover the parent
-- ARGV[7]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run
-- ARGV[8]    block ids, 4 bytes a chunk, or ""
-- ARGV[9]    metadata of the chain, msgpack, or "": kept with a node that ends where the chain does
-- returns    {nodes made, chunks made, nodes, chunks, bytes and leaves in the shard, then the path as walk tells it but
--            for the new nodes that it ends with: they are as they were sent, in runs of ARGV[3]}
-- errors     DPGONE, DPSCHEMA, DPNOPARENT, DPSTALE, DPDAMAGED
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       one HMGET, one HGETALL and a few HSET a node that was there, two HSET a new one; a split moves no child
-- @include guard
-- @include keys
-- @include walk
-- @include path
-- @include policies
-- @include score
-- @include payload
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include edit
-- @include create
-- @include publish
local chain = ARGV[7]
local done, problem = publish(chain, tonumber(ARGV[6]), ARGV[9], {
  now = ARGV[2], max_run = tonumber(ARGV[3]), holder = ARGV[4], epoch = tonumber(ARGV[5]),
  column = 'b:', width = 4, ids = ARGV[8],
})
if not done then
  return problem
end
return walk(slice(chain, 0, done.there), '', { done.nodes, done.chunks, unpack(settle()) })
