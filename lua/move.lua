#!lua flags=allow-oom
-- move: payloads of a node lie in another tier now, if the node still is what the mover saw. The copies were written
-- before and would have gone by themselves; those that were moved go.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the node's head, in hex
-- ARGV[3]    the tier that the payloads were in: @warm or @cold
-- ARGV[4]    their sizes there, 4 bytes a chunk, as the mover saw them; of leading chunks alone when they become warm
-- ARGV[5]    the sizes of the copies, likewise; 0 for chunks that are left where they are
-- returns    1 when moved, 0 when the node is another one, a copy is not there, or what is around it does not allow it
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: on a full server it makes room
-- cost       three TYPE, HMGET, a STRLEN and a PERSIST for each part, two HSET, UNLINK
-- @include guard
-- @include writes
-- @include keys
-- @include tally
-- @include covered
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include keep
-- @include account
-- @include tell
-- @include place
-- @include lists
local head, from, seen, copies = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local to = from == '@warm' and '@cold' or '@warm'
local run, sizes, there = unpack(redis.call('HMGET', node_key(head), 'r', 'b:' .. from, 'b:' .. to))
local rest = to == '@warm' and (sizes or ''):sub(#seen + 1) or ''
if not is_run(head, run) or seen == '' or sizes ~= seen .. rest or #seen ~= #copies or not may_move(head, to) then
  return answer(0)
end
local after, elsewhere = joined(there or '', copies), redis.call('HGET', KEYS[1], 'elsewhere') == '1'
local moved = slice(run, 0, #after / 4)
if to == '@cold' and elsewhere then
  redis.call('HSET', base .. 'unsettled', head, moved) -- until the mover has told that server to keep the copies
  for at = 0, #after / 4 - 1 do
    redis.call('SREM', base .. 'trash', hex(run, at))
    redis.call('SADD', base .. 'kept', hex(run, at))
  end
elseif keep_all(to, moved, after) ~= after then
  return answer(0)
end
place(head, run, from, to, seen, rest, there or '', after)
settle()
return answer(1)
