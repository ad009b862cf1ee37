#!lua flags=allow-oom
-- evict: while the shard is over a bound, take the leaf that stands first in the order of eviction: its tail when that
-- is enough, else all of it; its parent may be a leaf then. Leased and pinned leaves stay.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the most leaves to take in this call
-- ARGV[3]    chunks that may stay, "" for any number
-- ARGV[4]    bytes that may stay, likewise
-- ARGV[5]    leaves that may stay, likewise
-- ARGV[6]    bytes of cold payloads that may stay, likewise
-- returns    {nodes removed, chunks removed, leased leaves passed over, 1 when there is more to do, else 0}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       a ZRANGE and an HGETALL a leaf, and its removal
-- @include guard
-- @include writes
-- @include budget
-- @include keys
-- @include tally
-- @include clock
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
-- @include leases
-- @include surplus
local most, most_chunks = tonumber(ARGV[2]), tonumber(ARGV[3]) or math.huge
local most_bytes, most_leaves, leaves = tonumber(ARGV[4]) or math.huge, tonumber(ARGV[5]) or math.huge, base .. 'leaves'
local most_cold = tonumber(ARGV[6]) or math.huge
redis.call('XLEN', base .. 'log')
redis.call('ZCARD', base .. 'hot')
local held = redis.call('HMGET', KEYS[1], 'chunks', 'bytes', 'cold')

-- How many chunks and bytes must go; none when every bound holds.
local function excess()
  if (held[3] or 0) + added.cold > most_cold then
    return math.huge, math.huge -- what has been idle longest goes first, and that is what lies cold
  elseif most_leaves < math.huge and redis.call('ZCARD', leaves) > most_leaves then
    return math.huge, math.huge
  end
  local chunks, bytes = (held[1] or 0) + added.chunks - most_chunks, (held[2] or 0) + added.bytes - most_bytes
  return math.max(chunks, 0), math.max(bytes, 0)
end
local nodes, chunks, moved, skipped, most_skipped = 0, 0, 0, 0, 200
local over, over_bytes = excess()
while over + over_bytes > 0 and nodes + moved < most and skipped < most_skipped do
  local head = redis.call('ZRANGE', leaves, skipped, skipped)[1]
  if not head then
    break
  end
  local flat, node = fields_of(head)
  local size, until_ms = math.floor(#(node.r or '') / 16), leased_until(head, flat)
  if until_ms > now then
    local behind_all = until_ms + (tonumber(hot_ms) or 0)
    if tonumber(redis.call('ZSCORE', leaves, head)) < behind_all then
      redis.call('ZADD', leaves, ('%.0f'):format(behind_all), head)
      moved = moved + 1
    else
      skipped = skipped + 1
    end
  elseif size == 0 then
    redis.call('ZREM', leaves, head) -- lost in a failover
  else
    local cut = surplus(size, node['b:@warm'] or '', over, over_bytes)
    if cut < size then
      chunks = chunks + shorten(head, size - cut, flat, node)
    else
      nodes, chunks = nodes + 1, chunks + unlink(head, flat, node)
    end
  end
  over, over_bytes = excess()
end
settle()
return answer({ nodes, chunks, moved + skipped, (over + over_bytes > 0 and nodes + moved >= most) and 1 or 0 })
