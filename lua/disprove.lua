#!lua flags=allow-oom
-- disprove: a reader found the payload of a chain's last chunk missing or damaged. If this server agrees, that is if
-- the tree still names what the reader looked for and the values still are what it saw, the payload is removed from the
-- tree with all that follows it.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the tier: @warm or @cold
-- ARGV[3]    the node's chunks up to that one, 16 bytes each, from its head on
-- ARGV[4]    size of the payload as the reader knows it, 4 bytes
-- ARGV[5]    header of a value that failed its check, "" for one that is missing or has another length
-- ARGV[6]    SHA-1 of that value in hex, "" where it is too long to be read here
-- ARGV[7]    what the call before returned to resume with, "" in the first
-- ARGV[8]    units of work to do in this call
-- returns    {1 when the evidence holds, chunks of coverage trimmed, "" when done, else what to resume with}
-- errors     DPGONE, DPSCHEMA, DPSTALE, DPDAMAGED
-- flags      allow-oom: it only makes room
-- cost       an HMGET, a STRLEN for each part, a GET with a SHA-1; then what trim costs
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
-- @include keep
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
-- @include uncover
-- @include climb
-- @include descend
-- @include withdraw
local tier, chain, size, header, digest = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local at = #chain / 16 - 1
allow(tonumber(ARGV[8]))
local elsewhere = tier == '@cold' and redis.call('HGET', KEYS[1], 'elsewhere') == '1' -- the caller asked that server
local run, sizes = unpack(redis.call('HMGET', node_key(hex(chain, 0)), 'r', 'b:' .. tier))

-- Whether the values on this server are what the reader saw.
local function is_as_seen()
  local first = base .. tiers[tier] .. hex(chain, at)
  if header == '' then
    return whole_size(tier, hex(chain, at)) ~= size_at(size, 0)
  elseif length_of(first) ~= math.min(size_at(size, 0), part)
    or redis.call('GETRANGE', first, 0, #header - 1) ~= header then
    return false
  end
  return digest == '' or not redis.sha1hex or redis.sha1hex(redis.call('GET', first)) == digest
end

if not run or slice(run, 0, at + 1) ~= chain or (sizes or ''):sub(at * 4 + 1, at * 4 + 4) ~= size then
  return answer({ 0, 0, '' })
elseif not elsewhere and not is_as_seen() then
  return answer({ 0, 0, '' })
end
local trimmed, problem, _, _, resume = withdraw(chain, tier, 1, ARGV[7])
if not trimmed then
  return problem
end
settle()
return answer({ 1, trimmed, resume })
