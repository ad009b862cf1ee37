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
-- returns    {nodes made, chunks made, nodes, chunks, bytes and leaves in the shard, then the path as walk tells it}
-- errors     DPGONE, DPSCHEMA, DPNOPARENT, DPSTALE, DPDAMAGED
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       one HMGET, one HGETALL and a few HSET a node on the path; a split moves no child
-- @include guard
-- @include keys
-- @include walk
-- @include path
-- @include policies
-- @include score
-- @include account
-- @include tell
-- @include discard
-- @include edit
-- @include create
local now, max_run, holder, epoch = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local depth, chain, blocks, metadata = tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]
local total = #chain / 16

-- First only look, at every key that is going to change: what is wrong must show before anything is written.
local path, pos = read_path(chain, holder, epoch)
if not path then
  return pos
elseif depth > 0 and not (pos > 0 and covers_parent(path[1].head, holder, epoch)) then
  return redis.error_reply('DPNOPARENT the chain goes on from a node that is gone: publish it from the root')
end
local last = path[#path]
local is_leaf, stop = redis.call('HLEN', junction_key(last and hex(last.run:sub(-16)) or '')) == 0, pos
if last and last.matched < last.size then
  redis.call('HLEN', node_key(hex(slice(last.run, last.matched, last.matched + 1))))
elseif last and is_leaf and last.size < max_run and not redis.call('HGET', node_key(last.head), 'm') then
  stop = math.min(total, last.first + max_run)
end
check(chain, stop, max_run)

-- Then write.
local nodes, chunks = 0, total - pos
if last and (chunks > 0 or metadata ~= '') and last.matched < last.size then
  split(last, last.matched, is_leaf)
  nodes = 1
elseif stop > pos then
  pos = grow(last, chain, stop)
end
for _, node in ipairs(path) do
  cover(node, holder, epoch, node.matched, blocks)
end
local tail = last and last.head
if pos < total then
  if tail then
    redis.call('ZREM', base .. 'leaves', tail)
  end
  local made
  tail, made = create(chain, pos, depth, tail, max_run, { now = now, holder = holder, epoch = epoch }, blocks)
  nodes = nodes + made
else
  local accessed = ('%.0f'):format(math.max(tonumber(now), tonumber(last.accessed)))
  redis.call('HSET', node_key(tail), 'a', accessed)
  rank(tail, accessed, last.hits, last.depth, last.size)
end
if metadata ~= '' then
  account(0, 0, 0, #metadata - #(redis.call('HGET', node_key(tail), 'm') or ''))
  redis.call('HSET', node_key(tail), 'm', metadata)
end
account(nodes, chunks, 0, 0)
return walk(chain, '', { nodes, chunks, unpack(settle()) })
