#!lua flags=allow-oom
-- erase: remove the keys of a shard whose tree is empty, unless somebody has used it lately.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the other keys are derived from it and share its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    ms: nothing is removed where the shard was used after this; "" to remove it in any case
-- returns    1 when removed, 0 when nodes are left or it was used
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       an HMGET, an EXISTS and an UNLINK
-- @include guard
-- @include reads
-- @include keys
local nodes, used = unpack(redis.call('HMGET', KEYS[1], 'nodes', 'used'))
local is_used = ARGV[2] ~= '' and (tonumber(used or '') or 0) > tonumber(ARGV[2])
if is_used or (tonumber(nodes or '') or 0) > 0 or redis.call('EXISTS', base .. 'j:root') == 1 then
  return answer(0)
end
redis.call('UNLINK', base .. 'leaves', base .. 'log', base .. 'hot', base .. 'holders', base .. 'writers',
  base .. 'trash', base .. 'kept', base .. 'unsettled', KEYS[1])
return { 1, generation or '', written, written }
