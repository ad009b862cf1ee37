#!lua flags=allow-oom
-- evict: while the shard is over a bound, take the leaf that stands first in the order of eviction: its tail when that
-- is enough, or all that the call's budget allows, else all of it; its parent may be a leaf then. Leased and pinned
-- leaves stay: the next call goes on behind those that were passed over.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the most leaves to take in this call
-- ARGV[3]    chunks that may stay, "" for any number
-- ARGV[4]    bytes that may stay, likewise
-- ARGV[5]    leaves that may stay, likewise
-- ARGV[6]    bytes of cold payloads that may stay, likewise
-- ARGV[7]    rank among the leaves to begin with: so many that earlier calls passed over stand before it
-- ARGV[8]    "1" to take leased and pinned leaves as well, "" to pass over them
-- returns    {nodes removed, chunks removed, leased leaves passed over, 1 when there is more to do, else 0, rank for
--            the next call, -1 when the last leaf was seen}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       a ZRANGE and an HGETALL a leaf, and its removal: an UNLINK for every part of its payloads
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
local most, begin, leaves = tonumber(ARGV[2]), tonumber(ARGV[7]), base .. 'leaves'
redis.call('XLEN', base .. 'log')
redis.call('ZCARD', base .. 'hot')
local held = redis.call('HMGET', KEYS[1], 'chunks', 'bytes', 'cold')
local bounds = { tonumber(ARGV[3]) or math.huge, tonumber(ARGV[4]) or math.huge, tonumber(ARGV[5]) or math.huge,
  tonumber(ARGV[6]) or math.huge }

local nodes, chunks, moved = 0, 0, 0
local rank_now, over, over_bytes = begin, excess(held, unpack(bounds))
while over + over_bytes > 0 and nodes + moved < most and not is_spent() do
  local head = redis.call('ZRANGE', leaves, rank_now, rank_now)[1]
  if not head then
    settle()
    return answer({ nodes, chunks, moved + rank_now - begin, 0, -1 })
  end
  local flat, node = fields_of(head)
  spend(1 + #flat / 25)
  local size, until_ms = math.floor(#(node.r or '') / 16), leased_until(head, flat)
  if size > 0 and not is_run(head, node.r) then
    damaged, nodes = damaged + 1, nodes + 1
    chunks = chunks + unlink(head, flat, node)
  elseif until_ms > now and ARGV[8] ~= '1' then
    local behind_all = until_ms + hot_ms
    if tonumber(redis.call('ZSCORE', leaves, head)) < behind_all then
      redis.call('ZADD', leaves, ('%.0f'):format(behind_all), head)
      moved = moved + 1
    else
      rank_now = rank_now + 1
    end
  elseif size == 0 or has_children(head, node.r) then
    redis.call('ZREM', leaves, head) -- lost in a failover, or named by somebody who should not have
  else
    local cut = math.min(surplus(size, node['b:@warm'] or '', over, over_bytes), affordable(size, node))
    if cut < size then
      chunks = chunks + shorten(head, size - cut, flat, node)
    else
      nodes, chunks = nodes + 1, chunks + unlink(head, flat, node)
    end
  end
  over, over_bytes = excess(held, unpack(bounds))
end
settle()
return answer({ nodes, chunks, moved + rank_now - begin, over + over_bytes > 0 and 1 or 0, rank_now })
