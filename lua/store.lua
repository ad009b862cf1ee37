#!lua
-- store: say that the payloads of a chain are there, as far as they are: they were written before, and would have gone
-- by themselves; from now on they stay. A call takes as many leading chunks as its budget allows: the next one begins
-- with the last node of those.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the most chunks a run may have
-- ARGV[3]    depth of the chain's first chunk; above 0 that must be a node's head, and all above it be warm
-- ARGV[4]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run
-- ARGV[5]    its leading chunks, of one node, that an earlier call has stored: they are not looked at again
-- returns    {leading chunks that are warm now, first chunk of the last node of these, 1 when the call stopped for its
--            budget, else 0, nodes, chunks, bytes and leaves in the shard}
-- errors     DPGONE, DPSCHEMA, DPNOPARENT, DPSTALE, DPDAMAGED, DPAGAIN
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       a STRLEN and a PERSIST for each part, of about 520 values at most, and what insert costs
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
-- @include keep
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include edit
-- @include cover
-- @include create
-- @include hindrance
-- @include publish
local chain, keys, ends = ARGV[4], {}, {}
local sizes = { stored_before(chain, tonumber(ARGV[5])) }
local known, total, more = #sizes[1] / 4, #chain / 16, 0
allow(175) -- first only look: what the tree refuses expires
for at = known, total - 1 do
  local first = base .. 'kv:' .. hex(chain, at)
  local size, found = length_of(first), { first }
  if size == part then
    size, found = whole_size('@warm', hex(chain, at))
  end
  if size == 0 then
    total = at
    break
  end
  sizes[#sizes + 1] = packed_size(size)
  for i = 1, #found do
    keys[#keys + 1] = found[i]
  end
  ends[at + 1] = #keys
  spend(#found / 3)
  if is_spent() and at + 1 < total then
    total, more = at + 1, 1
    break
  end
end
local last = 0
if total > 0 then
  allow(100)
  local done, problem = publish(slice(chain, 0, total), tonumber(ARGV[3]), '', {
    now = ('%.0f'):format(now), max_run = tonumber(ARGV[2]), holder = '@warm', epoch = 1,
    column = 'b:', width = 4, ids = table.concat(sizes),
  })
  if not done then
    return problem
  end
  total, last, more = done.taken, done.starts[#done.starts], (more == 1 or done.taken < total) and 1 or 0
  for i = 1, ends[total] or 0 do
    redis.call('PERSIST', keys[i])
  end
end
return answer({ total, last, more, unpack(settle()) })
