#!lua
-- store: say that the payloads of a chain are there, as far as they are: they were written before, and would have gone
-- by themselves; from now on they stay.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    the most chunks a run may have
-- ARGV[3]    depth of the chain's first chunk; above 0 that must be a node's head, and all above it be warm
-- ARGV[4]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run
-- returns    {leading chunks that are warm now, nodes, chunks, bytes and leaves in the shard}
-- errors     DPGONE, DPSCHEMA, DPNOPARENT, DPSTALE, DPDAMAGED
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       a STRLEN and a PERSIST for each part, and what insert costs
-- @include guard
-- @include keys
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
-- @include create
-- @include repeats
-- @include publish
local chain = ARGV[4]
local sizes = keep_all('@warm', chain, '') -- only looks: what the tree refuses expires
if sizes ~= '' then
  local done, problem = publish(slice(chain, 0, #sizes / 4), tonumber(ARGV[3]), '', {
    now = ('%.0f'):format(now), max_run = tonumber(ARGV[2]), holder = '@warm', epoch = 1,
    column = 'b:', width = 4, ids = sizes,
  })
  if not done then
    return problem
  end
  keep_all('@warm', slice(chain, 0, #sizes / 4))
end
return { #sizes / 4, unpack(settle()) }
