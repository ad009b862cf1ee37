#!lua flags=no-writes
-- where: in which tier the payloads of chains' leading chunks lie, of each up to the first that has none.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2..]  chains, 16 bytes a chunk, each from a node's head on; at most 4,096 chunks in all, and one run
-- returns    for each chain: {sizes of the warm ones, sizes of the cold ones, 4 bytes a chunk each, 0 for those in the
--            other tier, first chunks of its nodes, with commas between}; and "more" or "rest" at the end when the
--            call stopped for its budget: later chains were not looked at, and with "more" the last one told goes on
--            from its last node
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HMGET a node, at most about 300 nodes
-- @include guard
-- @include reads
-- @include keys
-- @include budget
-- @include walk
local none, reply = '\0\0\0\0', {}

-- The sizes of a node's leading payloads in each tier, as far as it has them without a gap, and whether that is all.
local function sizes_of(run, matched, held, sizes, others, warm, cold)
  local covered = tonumber((held or ''):match('%d+$')) or 0
  if matched > 0 and covered >= matched and #sizes >= matched * 4 and not sizes:find(none, 1, true) then
    warm[#warm + 1], cold[#cold + 1] = sizes:sub(1, matched * 4), none:rep(matched) -- all warm, as most are
    return matched * 16 == #run
  end
  for at = 0, matched - 1 do
    local is_warm = at < covered
    local size = (is_warm and sizes or others or ''):sub(at * 4 + 1, at * 4 + 4)
    if #size < 4 or size == none then
      return false
    end
    warm[#warm + 1], cold[#cold + 1] = is_warm and size or none, is_warm and none or size
  end
  return matched > 0 and matched * 16 == #run
end

for at = 2, #ARGV do
  local chain, first, whole, warm, cold, starts = ARGV[at], 0, true, {}, {}, {}
  while whole and first < #chain / 16 do
    local run, held, sizes, others = unpack(redis.call('HMGET', node_key(hex(chain, first)),
      'r', 'h:@warm', 'b:@warm', 'b:@cold'))
    local matched = run and #run % 16 == 0 and match(run, chain, first) or 0
    if matched > 0 then
      starts[#starts + 1] = first
    end
    whole = sizes_of(run, matched, held, sizes, others, warm, cold)
    first = first + matched
    spend(0.65 + matched / 60)
    if is_spent() then
      break
    end
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3] = table.concat(warm), table.concat(cold), table.concat(starts, ',')
  local goes_on = whole and first < #chain / 16
  if is_spent() and (goes_on or at < #ARGV) then
    reply[n + 4] = goes_on and 'more' or 'rest'
    break
  end
end
return answer(reply)
