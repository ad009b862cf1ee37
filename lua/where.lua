#!lua flags=no-writes
-- where: in which tier the payloads of a chain's leading chunks lie, up to the first that has none.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    the chain, 16 bytes a chunk, from a node's head on
-- returns    {sizes of the warm ones, sizes of the cold ones, 4 bytes a chunk each, 0 for those in the other tier,
--             first chunk of each node, ...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HMGET a node
-- @include guard
-- @include keys
-- @include walk
local chain, first, whole, none = ARGV[2], 0, true, '\0\0\0\0'
local warm, cold, reply = {}, {}, { '', '' }
while whole and first < #chain / 16 do
  local run, held, sizes, _, others = unpack(redis.call('HMGET', node_key(hex(chain, first)),
    'r', 'h:@warm', 'b:@warm', 'h:@cold', 'b:@cold'))
  local matched = run and #run % 16 == 0 and match(run, chain, first) or 0
  local covered = tonumber((held or ''):match('%d+$')) or 0
  reply[#reply + 1] = first
  for at = 0, matched - 1 do
    local is_warm = at < covered
    local size = (is_warm and sizes or others or ''):sub(at * 4 + 1, at * 4 + 4)
    if #size < 4 or size == none then
      whole = false
      break
    end
    warm[#warm + 1], cold[#cold + 1] = is_warm and size or none, is_warm and none or size
  end
  whole, first = whole and matched > 0 and matched * 16 == #run, first + matched
end
reply[1], reply[2] = table.concat(warm), table.concat(cold)
return reply
